// Operations in which threads of a warp or of a block meet: warp intrinsics and named barriers.
#include "internal.h"

namespace cumoe_host {

// --------------------------------------------------------------------------------- warp operations

unsigned active_lanes() { return self->warp->live; }

void collective(const char* name, unsigned mask, void* operands, Apply apply, bool aligned,
                Site site) {
  FullThread* t = me();
  Warp* w = t->warp;
  complete_some(t);
  if (!(mask >> t->lane & 1u))
    fail(site, "%s(mask 0x%08x) does not name its own lane %u", name, mask, t->lane);
  if (mask & ~w->live) {
    fail(site, "%s(mask 0x%08x) names lanes that have exited or do not exist: 0x%08x", name, mask,
         mask & ~w->live);
  }
  t->pending = {name, mask, operands, apply, aligned};
  t->site = site;
  bool all = true;
  void* lanes[32] = {};
  for (unsigned l = 0; l < w->count; ++l) {
    if (!(mask >> l & 1u)) continue;
    FullThread* other = w->threads[l];
    if (other != t && other->state != State::kCollective) {
      all = false;
      continue;
    }
    const Collective& c = other->pending;
    if (c.mask != mask || c.apply != apply || strcmp(c.name, name) != 0 ||
        (aligned && (other->site.line != site.line || strcmp(other->site.file, site.file) != 0))) {
      fail(site, "%s(mask 0x%08x), while lane %u is in %s(mask 0x%08x) at %s", name, mask, l,
           c.name, c.mask, at(other->site).c_str());
    }
    lanes[l] = c.operands;
  }
  if (!all) {
    suspend(State::kCollective, name, site);
    return;
  }
  apply(lanes, mask);
  for (unsigned l = 0; l < w->count; ++l) {
    if ((mask >> l & 1u) && w->threads[l] != t) make_runnable(w->threads[l]);
  }
  // Whoever came last has no head start.
  make_runnable(t);
  to_scheduler();
}

// ---------------------------------------------------------------------------------------- barriers

namespace {

void release(Barrier& barrier) {
  for (FullThread* t : barrier.waiting) make_runnable(t);
  barrier.waiting.clear();
  barrier.arrived = 0;
}

}  // namespace

void check_barrier(Block* b, Barrier& barrier) {
  if (barrier.arrived == 0) return;
  const unsigned needed = barrier.count ? barrier.count : b->live;
  if (barrier.arrived >= needed) release(barrier);
}

void barrier(const char* name, int id, unsigned count, bool wait, Site site) {
  FullThread* t = me();
  Block* b = t->block;
  complete_some(t);
  if (id < 0 || id >= static_cast<int>(kMaxBarriers))
    fail(site, "%s: barrier %d does not exist", name, id);
  if (count % 32 != 0) fail(site, "%s: %u threads are no whole warps", name, count);
  if (!b->words.empty()) hand_over();
  Barrier& r = b->barriers[id];
  if (r.arrived == 0) {
    r.count = count;
    r.first_site = site;
  } else if (r.count != count) {
    fail(site, "%s %d with %u threads, while others expect %u at %s", name, id, count, r.count,
         at(r.first_site).c_str());
  } else if (count == 0 &&
             (r.first_site.line != site.line || strcmp(r.first_site.file, site.file) != 0)) {
    fail(site, "%s in divergent code: other threads of the block wait at %s", name,
         at(r.first_site).c_str());
  }
  ++r.arrived;
  if (wait) {
    t->state = State::kBarrier;
    t->doing = name;
    t->site = site;
    r.waiting.push_back(t);
  }
  check_barrier(b, r);
  if (wait) to_scheduler();
}

}  // namespace cumoe_host
