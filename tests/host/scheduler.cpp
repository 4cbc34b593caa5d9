// Fibres and the scheduler of a block: which thread runs next, and up to where.
//
// A seed chooses a policy (any thread, ascending, descending, one warp at a time) and then every
// single step; a thread runs from one yield point to the next.
#include <stdlib.h>
#include <sys/mman.h>

#include "internal.h"

namespace cumoe_host {

Thread* self = nullptr;
Random rng;
volatile bool on_fibre = false;
std::vector<Fibre> spare_fibres;

namespace {

constexpr size_t kStackBytes = 256 << 10;

// ------------------------------------------------------------------------------------------ fibres

#if defined(__x86_64__)
extern "C" void cumoe_host_switch(void** save, void* load);
asm(R"(
.text
.globl cumoe_host_switch
.type cumoe_host_switch, @function
cumoe_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cumoe_host_switch, .-cumoe_host_switch
)");
#endif

void fibre_main();

void prepare(Fibre& f) {
  if (f.stack == nullptr) {
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    f.stack = static_cast<unsigned char*>(p);
    mprotect(p, 4096, PROT_NONE);
  }
#if CUMOE_ASAN
  __asan_unpoison_memory_region(f.stack + 4096, kStackBytes - 4096);
#endif
  f.fake_stack = nullptr;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes);
  *--top = nullptr;                               // keeps the stack aligned at entry
  *--top = reinterpret_cast<void*>(&fibre_main);  // where the first switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.sp = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fibre_main, 0);
#endif
}

/// Runs a fibre until it gives way.
void to_fibre(Block* b, FullThread* t) {
  self = t;
  on_fibre = true;
#if CUMOE_ASAN
  __sanitizer_start_switch_fiber(&b->main.fake_stack, t->fibre.stack, kStackBytes);
#endif
#if defined(__x86_64__)
  cumoe_host_switch(&b->main.sp, t->fibre.sp);
#else
  swapcontext(&b->main.context, &t->fibre.context);
#endif
#if CUMOE_ASAN
  __sanitizer_finish_switch_fiber(b->main.fake_stack, nullptr, nullptr);
#endif
  on_fibre = false;
  self = nullptr;
}

}  // namespace

void to_scheduler(bool ending) {
  FullThread* t = me();
  Block* b = t->block;
#if CUMOE_ASAN
  __sanitizer_start_switch_fiber(ending ? nullptr : &t->fibre.fake_stack, b->main_stack,
                                 b->main_stack_bytes);
#endif
  (void)ending;
#if defined(__x86_64__)
  cumoe_host_switch(&t->fibre.sp, b->main.sp);
#else
  swapcontext(&t->fibre.context, &b->main.context);
#endif
#if CUMOE_ASAN
  __sanitizer_finish_switch_fiber(t->fibre.fake_stack, &b->main_stack, &b->main_stack_bytes);
#endif
}

// -------------------------------------------------------------------------------------- scheduling

void make_runnable(FullThread* t) {
  t->state = State::kRunnable;
  t->block->runnable.push_back(t->linear);
  ++run.progress;
}

void suspend(State state, const char* doing, Site site) {
  FullThread* t = me();
  ++run.progress;
  t->state = state;
  t->doing = doing;
  t->site = site;
  to_scheduler();
}

namespace {

void exit_thread() {
  FullThread* t = me();
  Block* b = t->block;
  Warp* w = t->warp;
  for (const Copy& c : t->copies) complete(c);
  t->copies.clear();
  deliver_arrivals(t);
  if (!b->stores.empty()) end_stores(t);
  if (!b->words.empty()) hand_over();
  t->state = State::kExited;
  --b->live;
  note_event();
  w->live &= ~(1u << t->lane);
  for (unsigned l = 0; l < w->count; ++l) {
    FullThread* other = w->threads[l];
    if (other->state == State::kCollective && (other->pending.mask >> t->lane & 1u)) {
      record(thread_text(t) + " has exited, but " + other->doing +
             str("(mask 0x%08x) of lane %u at ", other->pending.mask, l) + at(other->site) +
             " names it");
    }
  }
  for (Barrier& barrier : b->barriers) check_barrier(b, barrier);
  if (b->live == 0) {
    if (!b->words.empty()) land_words(b, true);
    const std::string text = unfinished(b);
    if (!text.empty()) record(block_text(b) + " ends, but " + text);
  }
}

void fibre_main() {
#if CUMOE_ASAN
  Block* block = self->block;
  __sanitizer_finish_switch_fiber(nullptr, &block->main_stack, &block->main_stack_bytes);
#endif
  Block* b = self->block;
  b->grid->kernel->entry(b->params);
  exit_thread();
  to_scheduler(true);
  abort();
}

unsigned pick(Block* b) {
  std::vector<unsigned>& r = b->runnable;
  size_t best = rng.below(static_cast<uint32_t>(r.size()));
  // Now and then any thread, whatever the policy.
  if (run.policy != kAny && rng.below(16) != 0) {
    for (size_t i = 0; i < r.size(); ++i) {
      if (run.policy == kAscending && r[i] < r[best]) best = i;
      if (run.policy == kDescending && r[i] > r[best]) best = i;
      if (run.policy == kWarp && r[i] / 32 == b->last_warp) {
        best = i;
        break;
      }
    }
  }
  const unsigned index = r[best];
  r[best] = r.back();
  r.pop_back();
  b->last_warp = index / 32;
  return index;
}

}  // namespace

void note_event() {
  ++run.progress;
  ++run.events;
  run.polls = 0;
}

uint32_t random_bits() { return rng.next(); }

void yield(Site site) {
  FullThread* t = me();
  complete_some(t);
  if (!t->warp->wgmmas.empty()) advance_wgmma(t->warp);
  t->site = site;
  t->block->runnable.push_back(t->linear);
  to_scheduler();
}

void pass_turn(Site site) {
  if (rng.below(2)) run.turn_passed = true;
  yield(site);
}

void poll(const char* what, Site site, const void* address) {
  FullThread* t = me();
  // After a first look at another place, others that poll have to look again.
  if (t->polled != address || t->site.line != site.line) ++run.progress;
  if (t->polled_since != run.progress) t->polls = 0;
  t->polled = address;
  t->polled_since = run.progress;
  ++run.polls;
  if (++t->polls > 8 && rng.below(16) == 0) run.turn_passed = true;
  t->doing = what;
  t->polling = true;
  yield(site);
  t->polling = false;
}

bool stuck(const Block* b) {
  // Enough looks that each word of an address was read since anything happened; a loop that only
  // sleeps may also count its rounds.
  constexpr unsigned kLooks = 8, kSleeps = 100000;
  if (!b->bulks.empty() || !b->words.empty() || b->copy_arrivals) return false;
  for (const BulkStore& s : b->stores) {
    if (s.state != BulkStore::kWritten) return false;
  }
  for (unsigned i : b->runnable) {
    const FullThread& t = b->threads[i];
    if (!t.polling || t.polled_since != run.progress) return false;
    if (t.polls < (t.polled ? kLooks : kSleeps)) return false;
  }
  return true;
}

// ------------------------------------------------------------------------------------------ blocks

void start(Block* b, const Job& job) {
  const Grid* grid = job.grid;
  const Dim3 index = job.index;
  b->grid = grid;
  b->grid_idx = job.grid_idx;
  b->params = job.params;
  b->block_idx = index;
  b->cluster = job.cluster;
  b->rank = job.rank;
  b->cluster->blocks[b->rank] = b;
  b->mbarriers.clear();
  b->bulks.clear();
  b->stores.clear();
  b->words.clear();
  b->copy_arrivals = 0;
  const unsigned n = grid->block.x * grid->block.y * grid->block.z;
  b->num_threads = b->live = n;
  if (b->threads.size() != n) {
    for (FullThread& t : b->threads) spare_fibres.push_back(t.fibre);
    b->threads.clear();
    b->threads.resize(n);
  }
  b->warps.assign((n + 31) / 32, Warp{});
  b->runnable.clear();
  b->last_warp = 0;
  for (Barrier& barrier : b->barriers) barrier = Barrier{};
  for (unsigned i = 0; i < n; ++i) {
    FullThread& t = b->threads[i];
    t.thread_idx = {i % grid->block.x, i / grid->block.x % grid->block.y,
                    i / grid->block.x / grid->block.y};
    t.linear = i;
    t.lane = i % 32;
    t.block = b;
    t.warp = &b->warps[i / 32];
    t.block_idx = index;
    t.block_dim = grid->block;
    t.grid_dim = grid->grid;
    t.state = State::kRunnable;
    t.doing = "nothing";
    t.site = {nullptr, 0};
    t.copies.clear();
    t.copy_arrivals.clear();
    t.copy_group = 0;
    t.copy_sequence = 0;
    t.store_group = 0;
    t.polling = false;
    t.polled = nullptr;
    t.polls = 0;
    if (t.fibre.stack == nullptr && !spare_fibres.empty()) {
      t.fibre = spare_fibres.back();
      spare_fibres.pop_back();
    }
    prepare(t.fibre);
    t.warp->threads[t.warp->count++] = &t;
    t.warp->live |= 1u << t.lane;
    b->runnable.push_back(i);
  }
  init_shared(b);
}

bool step(Block* b) try {
  if (!b->bulks.empty() && rng.below(256) < run.copy_chance) complete_bulk(b);
  // Sooner or later always: another block may poll for the data.
  if (!b->stores.empty() && rng.below(4096) < 16 * run.copy_chance + 1) advance_store(b);
  if (!b->words.empty() && rng.below(16384) < run.store_chance) land_words(b, false);
  if (b->runnable.empty()) {
    if (rng.below(2)) return complete_bulk(b) || complete_arrivals(b);
    return complete_arrivals(b) || complete_bulk(b);
  }
  FullThread* t = &b->threads[pick(b)];
  to_fibre(b, t);
  return true;
} catch (const Failed&) {
  self = nullptr;
  return true;
}

}  // namespace cumoe_host
