// Executes grids of fibres; see engine.h.
//
// Scheduling   a seed chooses a policy (any thread, ascending, descending, one warp at a time) and
//              then every single step; a thread runs from one yield point to the next.
// Memory       all thread-local storage of the kernel's library is its block's shared memory. It is
//              filled with a pattern before each block, and so is a guard behind the dynamic part.
// Errors       an operation that is not allowed, a deadlock, a signal and a run without progress
//              end the run with a message; fibres are dropped where they are.
#include <link.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <memory>

#include "internal.h"

namespace cumoe_host {

Thread* self = nullptr;
Random rng;
Run run;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 4096;

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

alignas(128) unsigned char params_copy[8][4096];

/// Whether a fibre runs, and not the scheduler; an error of the scheduler's own work is thrown.
volatile bool on_fibre = false;

struct Failed {};

/// Switches from a fibre to its block's scheduler.
void to_scheduler(bool ending = false) {
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

std::string format_text(const char* format, va_list args) {
  char text[2048];
  vsnprintf(text, sizeof text, format, args);
  return text;
}

}  // namespace

std::string str(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string s = format_text(format, args);
  va_end(args);
  return s;
}

namespace {

const char* base_name(const char* path) {
  const char* slash = path ? strrchr(path, '/') : nullptr;
  return slash ? slash + 1 : path ? path : "?";
}

}  // namespace

std::string at(Site s) { return s.line ? str("%s:%d", base_name(s.file), s.line) : "its start"; }

namespace {

std::string block_text(const Block* b) {
  return str("kernel %s, block (%u, %u, %u)", b->grid->kernel->name, b->block_idx.x, b->block_idx.y,
             b->block_idx.z);
}

}  // namespace

std::string thread_text(const FullThread* t) {
  return block_text(t->block) +
         str(", thread (%u, %u, %u)", t->thread_idx.x, t->thread_idx.y, t->thread_idx.z);
}

void record(const std::string& text) {
  if (!run.failed) run.error = text;
  run.failed = true;
}

namespace {

/// Lists what the threads of a block wait for, those with the same reason together.
std::string waiting_text(const Block* b) {
  struct Entry {
    std::string what;
    unsigned first, last, count;
  };
  std::vector<Entry> entries;
  for (const FullThread& t : b->threads) {
    std::string what;
    if (t.state == State::kExited) {
      what = "exited";
    } else if (t.state == State::kCollective) {
      what = str("in %s(mask 0x%08x) at ", t.doing, t.pending.mask) + at(t.site);
    } else if (t.state == State::kBarrier) {
      what = str("in %s at ", t.doing) + at(t.site);
      if (strcmp(t.doing, "mbarrier wait") == 0) what += mbarrier_text(&t);
    } else {
      what = str("polling %s at ", t.doing) + at(t.site);
    }
    bool found = false;
    for (Entry& e : entries) {
      if (e.what == what) e.last = t.linear, ++e.count, found = true;
    }
    if (!found) entries.push_back({what, t.linear, t.linear, 1});
  }
  std::string text;
  for (const Entry& e : entries) {
    text +=
        str("\n  %u thread%s from %u to %u: ", e.count, e.count == 1 ? "" : "s", e.first, e.last);
    text += e.what;
  }
  return text;
}

// ----------------------------------------------------------------------------- asynchronous copies

void complete(const Copy& c) {
  if (c.bytes) memcpy(c.destination, c.source, c.bytes);
  if (c.zeros) memset(static_cast<char*>(c.destination) + c.bytes, 0, c.zeros);
}

/// Makes the arrivals on mbarriers whose copies have all landed.
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

/// Lands all copies of one thread that others wait for. False if there is none.
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
  ++run.progress;
  return true;
}

/// Completes some pending copies of this thread, in any order.
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

// -------------------------------------------------------------------------------------- scheduling

}  // namespace

void make_runnable(FullThread* t) {
  t->state = State::kRunnable;
  t->block->runnable.push_back(t->linear);
  ++run.progress;
}

void suspend(State state, const char* doing, Site site) {
  FullThread* t = me();
  t->state = state;
  t->doing = doing;
  t->site = site;
  to_scheduler();
}

namespace {

void release(Barrier& barrier) {
  for (FullThread* t : barrier.waiting) make_runnable(t);
  barrier.waiting.clear();
  barrier.arrived = 0;
}

void check_barrier(Block* b, Barrier& barrier) {
  if (barrier.arrived == 0) return;
  const unsigned needed = barrier.count ? barrier.count : b->live;
  if (barrier.arrived >= needed) release(barrier);
}

void exit_thread() {
  FullThread* t = me();
  Block* b = t->block;
  Warp* w = t->warp;
  for (const Copy& c : t->copies) complete(c);
  t->copies.clear();
  deliver_arrivals(t);
  t->state = State::kExited;
  --b->live;
  ++run.progress;
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

// ----------------------------------------------------------------------------------- shared memory

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

constexpr uint8_t kGuard = 0xb7;

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

// ------------------------------------------------------------------------------------------ blocks

std::vector<Fibre> spare_fibres;

/// A block that is to run: where it is in its grid and in its cluster.
struct Job {
  const Grid* grid;
  const void* params;
  Dim3 index;
  Cluster* cluster;
  unsigned rank;
};

void start(Block* b, const Job& job) {
  const Grid* grid = job.grid;
  const Dim3 index = job.index;
  b->grid = grid;
  b->params = job.params;
  b->block_idx = index;
  b->cluster = job.cluster;
  b->rank = job.rank;
  b->cluster->blocks[b->rank] = b;
  b->mbarriers.clear();
  b->bulks.clear();
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

/// Runs one thread to its next yield point, or lands a copy. False if nothing can happen.
bool step(Block* b) try {
  if (!b->bulks.empty() && rng.below(256) < run.copy_chance) complete_bulk(b);
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

// ----------------------------------------------------------------------------------------- signals

uint64_t watched_progress = 0;
int watched_ticks = 0;

/// A fault of kernel code ends the run; the fibre is left where it is.
void on_signal(int number, siginfo_t* info, void*) {
  FullThread* t = me();
  if (number == SIGVTALRM) {
    if (t == nullptr || !on_fibre || run.failed) return;
    if (run.progress != watched_progress) {
      watched_progress = run.progress;
      watched_ticks = 0;
      return;
    }
    if (++watched_ticks < run.seconds) return;
    record(thread_text(t) + " makes no progress after " + at(t->site));
  } else if (t == nullptr || !on_fibre || run.failed) {
    signal(number, SIG_DFL);  // a fault of the engine itself: the process ends here
    return;
  } else {
    const char* name = number == SIGSEGV  ? "invalid memory access"
                       : number == SIGBUS ? "invalid memory access"
                       : number == SIGFPE ? "integer division by zero"
                                          : "trap";
    record(thread_text(t) + str(": %s, address %p, after ", name, info->si_addr) + at(t->site));
  }
  t->state = State::kExited;
  to_scheduler();
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGVTALRM};

struct SignalHandlers {
  struct sigaction old[sizeof kSignals / sizeof kSignals[0]];
  stack_t old_stack;
  itimerval old_timer;
  std::vector<unsigned char> stack;

  SignalHandlers() : stack(64 << 10) {
    stack_t alternative = {};
    alternative.ss_sp = stack.data();
    alternative.ss_size = stack.size();
    sigaltstack(&alternative, &old_stack);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
    int i = 0;
    for (int number : kSignals) sigaction(number, &action, &old[i++]);
    watched_ticks = 0;
    const itimerval second = {{1, 0}, {1, 0}};
    setitimer(ITIMER_VIRTUAL, &second, &old_timer);
  }
  ~SignalHandlers() {
    setitimer(ITIMER_VIRTUAL, &old_timer, nullptr);
    int i = 0;
    for (int number : kSignals) sigaction(number, &old[i++], nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};

// -------------------------------------------------------------------------------------------- runs

/// A resident block's OS thread and the token that says which of them runs.
struct Worker {
  pthread_t thread;
  sem_t go, gave_way;
  Block block;
  bool busy = false;  // has a block
  bool quit = false;
  const Job* next = nullptr;
  unsigned steps = 0;
  bool ran = false;
};

void* worker_main(void* data) {
  Worker* w = static_cast<Worker*>(data);
  stack_t alternative = {};
  std::vector<unsigned char> stack(64 << 10);
  alternative.ss_sp = stack.data();
  alternative.ss_size = stack.size();
  sigaltstack(&alternative, nullptr);
  while (true) {
    sem_wait(&w->go);
    if (w->quit) break;
    if (w->next) start(&w->block, *w->next);
    w->next = nullptr;
    w->ran = false;
    for (unsigned i = 0; i < w->steps && !run.failed && w->block.live && step(&w->block); ++i) {
      w->ran = true;
    }
    if (w->block.live == 0 && !run.failed) check_guard(&w->block);
    sem_post(&w->gave_way);
  }
  alternative.ss_flags = SS_DISABLE;
  sigaltstack(&alternative, nullptr);
  return nullptr;
}

/// One block after the other on this OS thread.
void run_in_turn(const std::vector<Job>& jobs) {
  static Block block;
  uint64_t polls = 0, progress = run.progress;
  for (const Job& job : jobs) {
    start(&block, job);
    while (block.live && !run.failed) {
      if (!step(&block)) {
        record("deadlock in " + block_text(&block) + ":" + waiting_text(&block));
      } else if (run.progress != progress) {
        progress = run.progress;
        polls = 0;
      } else if (++polls > 4000ull * block.num_threads + 4000000ull) {
        record("deadlock, all threads poll, in " + block_text(&block) + ":" + waiting_text(&block));
      }
    }
    if (run.failed) return;
    check_guard(&block);
  }
}

/// Up to `resident` blocks at the same time, in random turns.
void run_together(const std::vector<Job>& jobs, unsigned resident) {
  resident = std::min<unsigned>(resident, static_cast<unsigned>(jobs.size()));
  std::vector<Worker> workers(resident);
  for (Worker& w : workers) {
    sem_init(&w.go, 0, 0);
    sem_init(&w.gave_way, 0, 0);
    pthread_create(&w.thread, nullptr, worker_main, &w);
  }
  size_t next = 0;
  uint64_t idle = 0, progress = run.progress;
  while (!run.failed) {
    std::vector<Worker*> busy, idle_workers;
    for (Worker& w : workers) (w.busy ? busy : idle_workers).push_back(&w);
    // The blocks of a cluster start together, so each finds the others' shared memory.
    while (next < jobs.size() && idle_workers.size() >= jobs[next].cluster->blocks.size()) {
      for (size_t n = jobs[next].cluster->blocks.size(); n > 0; --n) {
        Worker* w = idle_workers.back();
        idle_workers.pop_back();
        w->next = &jobs[next++];
        w->busy = true;
        w->steps = 0;
        sem_post(&w->go);
        sem_wait(&w->gave_way);
        busy.push_back(w);
      }
    }
    if (busy.empty()) break;
    Worker* w = busy[rng.below(static_cast<uint32_t>(busy.size()))];
    w->steps = 1 + rng.below(rng.below(4) ? 64 : 4096);
    sem_post(&w->go);
    sem_wait(&w->gave_way);
    if (w->block.live == 0) w->busy = false, ++run.progress;
    if (run.progress != progress) {
      progress = run.progress;
      idle = 0;
    } else if (++idle > 20000 + 2000 * busy.size()) {
      std::string text = "deadlock:";
      for (Worker* other : busy) {
        text += "\n" + block_text(&other->block) + ":" + waiting_text(&other->block);
      }
      record(text);
    }
  }
  for (Worker& w : workers) {
    w.quit = true;
    sem_post(&w.go);
    pthread_join(w.thread, nullptr);
    sem_destroy(&w.go);
    sem_destroy(&w.gave_way);
    for (FullThread& t : w.block.threads) spare_fibres.push_back(t.fibre);
  }
}

}  // namespace

// ------------------------------------------------------------------------------------- for kernels

void fail(Site site, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string text = format_text(format, args);
  va_end(args);
  FullThread* t = me();
  record(thread_text(t) + ", " + at(site) + ": " + text);
  if (!on_fibre) throw Failed{};
  t->state = State::kExited;
  to_scheduler();
  abort();
}

uint32_t random_bits() { return rng.next(); }

unsigned active_lanes() { return self->warp->live; }

void yield(Site site) {
  FullThread* t = me();
  complete_some(t);
  if (!t->warp->wgmmas.empty()) advance_wgmma(t->warp);
  t->site = site;
  t->block->runnable.push_back(t->linear);
  to_scheduler();
}

void poll(const char* what, Site site) {
  FullThread* t = me();
  t->doing = what;
  yield(site);
}

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

void barrier(const char* name, int id, unsigned count, bool wait, Site site) {
  FullThread* t = me();
  Block* b = t->block;
  complete_some(t);
  if (id < 0 || id >= static_cast<int>(kMaxBarriers))
    fail(site, "%s: barrier %d does not exist", name, id);
  if (count % 32 != 0) fail(site, "%s: %u threads are no whole warps", name, count);
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

void async_copy(void* destination, const void* source, unsigned bytes, unsigned zeros, Site site) {
  FullThread* t = me();
  t->site = site;
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

}  // namespace cumoe_host

using namespace cumoe_host;

/// Blocks of a cluster: of the kernel's own attribute, or else of the launch.
static Dim3 cluster_of(const Grid& grid) {
  return grid.kernel->cluster.x ? grid.kernel->cluster : grid.cluster;
}

extern "C" int cumoe_host_run(const Grid* grids, int num_grids, int resident, uint64_t seed,
                              int seconds, char* message, size_t message_bytes) {
  rng.state = seed;
  run = Run{};
  run.seconds = seconds;
  run.policy = static_cast<Policy>(seed % 4);
  const unsigned chances[] = {0, 8, 64, 256};
  run.copy_chance = chances[seed / 4 % 4];
  const uint8_t poisons[] = {0xff, 0xa5, 0x7f};
  run.poison = poisons[seed % 3];
  struct First {
    const Grid* grid;
    const void* params;
    Dim3 index;
  };
  std::vector<First> clusters;
  unsigned largest = 1;
  for (int g = 0; g < num_grids; ++g) {
    const Grid& grid = grids[g];
    if (g >= 8 || grid.kernel->params_bytes > sizeof params_copy[0] ||
        grid.smem_bytes > grid.kernel->dynamic_capacity) {
      snprintf(message, message_bytes,
               "kernel %s: more grids, parameters or shared memory than the "
               "engine has room for",
               grid.kernel->name);
      return 1;
    }
    memcpy(params_copy[g], grid.params, grid.kernel->params_bytes);
    const Dim3 c = cluster_of(grid);
    if (grid.grid.x % c.x || grid.grid.y % c.y || grid.grid.z % c.z) {
      snprintf(message, message_bytes, "kernel %s: the cluster does not divide the grid",
               grid.kernel->name);
      return 1;
    }
    for (unsigned i = 0; i < grid.grid.x / c.x * (grid.grid.y / c.y) * (grid.grid.z / c.z); ++i) {
      const unsigned x = i % (grid.grid.x / c.x), rest = i / (grid.grid.x / c.x);
      const Dim3 first = {x * c.x, rest % (grid.grid.y / c.y) * c.y,
                          rest / (grid.grid.y / c.y) * c.z};
      clusters.push_back({&grid, params_copy[g], first});
    }
    largest = std::max(largest, c.x * c.y * c.z);
  }
  // The hardware promises no order of blocks.
  for (size_t i = clusters.size(); i > 1; --i) {
    std::swap(clusters[i - 1], clusters[rng.below(static_cast<uint32_t>(i))]);
  }
  std::vector<std::unique_ptr<Cluster>> owned;
  std::vector<Job> jobs;
  for (const auto& [grid, params, first] : clusters) {
    const Dim3 c = cluster_of(*grid);
    owned.push_back(std::make_unique<Cluster>());
    owned.back()->blocks.resize(c.x * c.y * c.z);
    for (unsigned r = 0; r < c.x * c.y * c.z; ++r) {
      const Dim3 index = {first.x + r % c.x, first.y + r / c.x % c.y, first.z + r / c.x / c.y};
      jobs.push_back({grid, params, index, owned.back().get(), r});
    }
  }
  {
    SignalHandlers handlers;
    if (resident > 1 || largest > 1) {
      run_together(jobs, std::max(static_cast<unsigned>(resident), largest));
    } else {
      run_in_turn(jobs);
    }
  }
  if (!run.failed) return 0;
  snprintf(message, message_bytes, "%s (seed %llu)", run.error.c_str(),
           static_cast<unsigned long long>(seed));
  return 1;
}

// --------------------------------------------------------------------------------- UBSan's reports

// Every report's data begins with the source position, so the library of the compiler is not
// needed.
struct UbsanLocation {
  const char* file;
  uint32_t line, column;
};

#define CUMOE_UBSAN(name, text)                                         \
  extern "C" void __ubsan_handle_##name(UbsanLocation* where) {         \
    if (self) fail({where->file, static_cast<int>(where->line)}, text); \
  }                                                                     \
  extern "C" void __ubsan_handle_##name##_abort(UbsanLocation* where) { \
    __ubsan_handle_##name(where);                                       \
    abort();                                                            \
  }

CUMOE_UBSAN(add_overflow, "signed integer overflow of +")
CUMOE_UBSAN(sub_overflow, "signed integer overflow of -")
CUMOE_UBSAN(mul_overflow, "signed integer overflow of *")
CUMOE_UBSAN(negate_overflow, "signed integer overflow of unary -")
CUMOE_UBSAN(divrem_overflow, "division by zero or its overflow")
CUMOE_UBSAN(shift_out_of_bounds, "shift by too much, or of a value that does not fit")
CUMOE_UBSAN(out_of_bounds, "array index out of bounds")
CUMOE_UBSAN(type_mismatch_v1, "null or misaligned pointer")
CUMOE_UBSAN(pointer_overflow, "pointer arithmetic overflows")
CUMOE_UBSAN(load_invalid_value, "value that its type does not have")
CUMOE_UBSAN(float_cast_overflow, "float to integer conversion out of range")
CUMOE_UBSAN(vla_bound_not_positive, "array bound not positive")
CUMOE_UBSAN(builtin_unreachable, "unreachable code reached")
CUMOE_UBSAN(missing_return, "function ends without a value")
CUMOE_UBSAN(nonnull_arg, "null argument")
CUMOE_UBSAN(invalid_builtin, "invalid argument of a builtin")
