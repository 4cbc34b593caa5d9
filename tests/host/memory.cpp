// Copies of cp.async, which land at a random moment before their wait, and shared memory.
//
// All thread-local storage of the kernel's library is its block's shared memory. It is filled with
// a pattern before each block, and so is a guard behind the dynamic part.
#include <link.h>

#include <algorithm>

#include "internal.h"

namespace cumoe_host {

// ----------------------------------------------------------------------------- asynchronous copies

void complete(const Copy& c) {
  if (c.bytes) memcpy(c.destination, c.source, c.bytes);
  if (c.zeros) memset(static_cast<char*>(c.destination) + c.bytes, 0, c.zeros);
}

void deliver_arrivals(FullThread* t) {
  for (size_t i = 0; i < t->copy_arrivals.size();) {
    const CopyArrival a = t->copy_arrivals[i];
    const bool pending = std::any_of(t->copies.begin(), t->copies.end(),
                                     [&](const Copy& c) { return c.sequence < a.sequence; });
    if (pending) {
      ++i;
      continue;
    }
    t->copy_arrivals.erase(t->copy_arrivals.begin() + static_cast<long>(i));
    --t->block->copy_arrivals;
    arrive(t->block, a.barrier, 0, a.site);
  }
}

bool complete_arrivals(Block* b) {
  if (b->copy_arrivals == 0) return false;
  size_t i = rng.below(b->num_threads);
  while (b->threads[i].copy_arrivals.empty()) i = (i + 1) % b->num_threads;
  FullThread* t = &b->threads[i];
  const uint64_t sequence = t->copy_arrivals[0].sequence;
  for (size_t c = 0; c < t->copies.size();) {
    if (t->copies[c].sequence < sequence) {
      complete(t->copies[c]);
      t->copies.erase(t->copies.begin() + static_cast<long>(c));
    } else {
      ++c;
    }
  }
  self = t;  // an arrival that fails is this thread's
  deliver_arrivals(t);
  self = nullptr;
  note_event();
  return true;
}

void complete_some(FullThread* t) {
  if (run.copy_chance == 0) return;
  for (size_t i = 0; i < t->copies.size();) {
    if (rng.below(256) < run.copy_chance) {
      complete(t->copies[i]);
      t->copies[i] = t->copies.back();
      t->copies.pop_back();
    } else {
      ++i;
    }
  }
  if (!t->copy_arrivals.empty()) deliver_arrivals(t);
}

void async_copy(void* destination, const void* source, unsigned bytes, unsigned zeros, Site site) {
  FullThread* t = me();
  t->site = site;
  if (bytes > 0) {
    // A fault here is the thread's; when the copy is made it would be the engine's.
    const auto* touched = static_cast<const volatile unsigned char*>(source);
    static_cast<void>(touched[0]), static_cast<void>(touched[bytes - 1]);
  }
  t->copies.push_back({destination, source, bytes, zeros, t->copy_group, t->copy_sequence++});
  complete_some(t);
}

void async_arrive(uint32_t barrier, Site site) {
  FullThread* t = me();
  t->copy_arrivals.push_back({barrier, t->copy_sequence, site});
  ++t->block->copy_arrivals;
  if (t->copies.empty()) deliver_arrivals(t);
  yield(site);
}

void async_commit(Site site) {
  FullThread* t = me();
  t->site = site;
  ++t->copy_group;
}

void async_wait(unsigned pending_groups, Site site) {
  FullThread* t = me();
  yield(site);
  for (size_t i = 0; i < t->copies.size();) {
    if (t->copies[i].group + pending_groups < t->copy_group) {
      complete(t->copies[i]);
      t->copies[i] = t->copies.back();
      t->copies.pop_back();
    } else {
      ++i;
    }
  }
  if (!t->copy_arrivals.empty()) deliver_arrivals(t);
}

// ----------------------------------------------------------------------------------- shared memory

namespace {

constexpr size_t kGuardBytes = 4096;
constexpr uint8_t kGuard = 0xb7;

struct FindTls {
  const void* code;
  unsigned char* begin;
  size_t bytes;
};

int find_tls(dl_phdr_info* info, size_t, void* data) {
  FindTls* f = static_cast<FindTls*>(data);
  const uintptr_t code = reinterpret_cast<uintptr_t>(f->code);
  bool inside = false;
  size_t bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& h = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + h.p_vaddr;
    if (h.p_type == PT_LOAD && code >= begin && code < begin + h.p_memsz) inside = true;
    if (h.p_type == PT_TLS) bytes = h.p_memsz;
  }
  if (!inside) return 0;
  f->begin = static_cast<unsigned char*>(info->dlpi_tls_data);
  f->bytes = bytes;
  return 1;
}

void fill(unsigned char* begin, unsigned char* end) {
  if (end > begin) memset(begin, run.poison, static_cast<size_t>(end - begin));
}

}  // namespace

void init_shared(Block* b) {
  const Kernel* k = b->grid->kernel;
  b->dynamic = k->dynamic_smem();  // also makes this OS thread's copy
  FindTls f = {reinterpret_cast<const void*>(k->entry), nullptr, 0};
  dl_iterate_phdr(find_tls, &f);
  b->shared_begin = f.begin;
  b->shared_end = f.begin + f.bytes;
  unsigned char* dynamic_end = b->dynamic + b->grid->smem_bytes;
  unsigned char* guard_end = b->dynamic + k->dynamic_capacity;
#if CUMOE_ASAN
  __asan_unpoison_memory_region(b->dynamic, k->dynamic_capacity);
#endif
  fill(b->shared_begin, b->dynamic);
  fill(b->dynamic, dynamic_end);
  memset(dynamic_end, kGuard, std::min<size_t>(kGuardBytes, guard_end - dynamic_end));
  fill(guard_end, b->shared_end);
#if CUMOE_ASAN
  __asan_poison_memory_region(dynamic_end, guard_end - dynamic_end);
#endif
}

void check_guard(Block* b) {
  unsigned char* begin = b->dynamic + b->grid->smem_bytes;
  unsigned char* capacity = b->dynamic + b->grid->kernel->dynamic_capacity;
#if CUMOE_ASAN
  __asan_unpoison_memory_region(begin, capacity - begin);
#endif
  unsigned char* end = std::min(begin + kGuardBytes, capacity);
  for (unsigned char* p = begin; p < end; ++p) {
    if (*p != kGuard) {
      record(block_text(b) +
             str(": byte %zu of dynamic shared memory was written, the launch has %zu",
                 static_cast<size_t>(p - b->dynamic), b->grid->smem_bytes));
      return;
    }
  }
}

uint32_t shared_address(const void* pointer, Site site) {
  Block* b = self->block;
  const unsigned char* p = static_cast<const unsigned char*>(pointer);
  if (p < b->shared_begin || p > b->shared_end) fail(site, "%p is not in shared memory", pointer);
  return static_cast<uint32_t>(p - b->shared_begin);
}

void* shared_pointer(uint32_t address, size_t bytes, Site site) {
  Block* b = self->block;
  unsigned char* p = b->shared_begin + address;
  unsigned char* dynamic_end = b->dynamic + b->grid->smem_bytes;
  unsigned char* unused_end = b->dynamic + b->grid->kernel->dynamic_capacity;
  const bool in_unused = p + bytes > dynamic_end && p < unused_end;
  if (p + bytes > b->shared_end || in_unused) {
    fail(site,
         "shared address 0x%x, %zu bytes: outside the %zu bytes of dynamic shared memory (which "
         "start at 0x%x)",
         address, bytes, b->grid->smem_bytes, static_cast<unsigned>(b->dynamic - b->shared_begin));
  }
  return p;
}

}  // namespace cumoe_host
