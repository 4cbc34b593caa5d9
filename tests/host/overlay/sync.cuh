// Functional models of the wrappers in cumoe/cu/sync.cuh, one for each, in the same order
// (sync.cpp).
#pragma once

#include "types.cuh"

namespace cumoe {
namespace ptx {

inline void st_release_sys(uint32_t* gmem, uint32_t value, CUMOE_SITE) {
  cumoe_host::release_store("st.release.sys", gmem, value, site);
}

inline uint32_t ld_acquire_sys(const uint32_t* gmem, CUMOE_SITE) {
  uint32_t value;
  cumoe_host::shared_load("ld.acquire.sys", gmem, &value, 1, site);
  return value;
}

inline void red_add_release_sys(uint32_t* gmem, uint32_t value, CUMOE_SITE) {
  cumoe_host::release_add("red.release.sys", gmem, value, site);
}

inline uint32_t atom_add_release_sys(uint32_t* gmem, uint32_t value, CUMOE_SITE) {
  return cumoe_host::release_add("atom.release.sys", gmem, value, site);
}

inline void st_relaxed_sys_v4(uint4* gmem, uint4 value, CUMOE_SITE) {
  const uint32_t words[] = {value.x, value.y, value.z, value.w};
  cumoe_host::relaxed_store("st.relaxed.sys.v4", gmem, words, 4, site);
}

inline uint4 ld_relaxed_sys_v4(const uint4* gmem, CUMOE_SITE) {
  uint32_t words[4];
  cumoe_host::shared_load("ld.relaxed.sys.v4", gmem, words, 4, site);
  return {words[0], words[1], words[2], words[3]};
}

inline void fence_acq_rel_sys(CUMOE_SITE) { cumoe_host::full_fence(site); }

}  // namespace ptx
}  // namespace cumoe
