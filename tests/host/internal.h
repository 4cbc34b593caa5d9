// What the parts of the engine share: threads, warps, blocks, clusters and the state of a run.
#pragma once

#include <signal.h>
#include <stdarg.h>
#include <sys/time.h>

#include <map>
#include <string>
#include <vector>

#include "engine.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define CUMOE_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define CUMOE_ASAN 0
#endif

namespace cumoe_host {

constexpr unsigned kMaxBarriers = 16;

struct FullThread;

struct Random {
  uint64_t state;
  uint32_t next() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((uint64_t{next()} * n) >> 32); }
};

struct Fibre {
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;
};

enum class State : uint8_t { kRunnable, kCollective, kBarrier, kExited };

/// A cp.async that has not landed.
struct Copy {
  void* destination;
  const void* source;
  unsigned bytes, zeros, group;
  uint64_t sequence;
};

/// An arrival on an mbarrier once the copies before it have landed.
struct CopyArrival {
  uint32_t barrier;
  uint64_t sequence;
  Site site;
};

struct Collective {
  const char* name;
  unsigned mask;
  void* operands;
  Apply apply;
  bool aligned;
};

/// A word of a relaxed store that has not landed (sync.cpp).
struct Word {
  uint32_t* to;
  uint32_t value;
  FullThread* owner;
  bool handed_over;  // at a barrier, to the threads of the block
};

struct FullThread : Thread {
  Fibre fibre;
  State state;
  const char* doing;
  Site site;
  Collective pending;
  std::vector<Copy> copies;
  std::vector<CopyArrival> copy_arrivals;
  unsigned copy_group;
  uint64_t copy_sequence;
  unsigned store_group;
  bool polling;           // gave way in `poll`
  const void* polled;     // the address it reads there, or null
  unsigned polls;         // of that address in one place, while nothing else happened
  uint64_t polled_since;  // run.progress then
};

/// A wgmma of one warp (16 of the 64 rows) that has not been waited for.
struct Wgmma {
  int kind, n;
  uint64_t a, b;
  bool accumulate;
  bool done;
  unsigned group;
  float* d[32];
};

/// What pending operations leave in the registers of 32 lanes, n / 2 each.
struct Accumulators {
  int n;
  std::vector<float> values;
};

struct Warp {
  FullThread* threads[32];
  unsigned count;
  unsigned live;
  // wgmma: the accumulators of pending operations are poison; their values are kept here, by lane.
  std::vector<Wgmma> wgmmas;
  std::map<float*, Accumulators> accumulators;  // by lane 0's pointer
  unsigned wgmma_group;
  unsigned wgmma_fences;                      // so far
  std::map<float*, unsigned> wgmma_released;  // fences at the wait that freed the accumulators
  uint64_t wgmma_trace;                       // hash of all operations
};

struct Barrier {
  unsigned arrived, count;
  Site first_site;
  std::vector<FullThread*> waiting;
};

struct MBarrier {
  int expected, pending;
  int64_t bytes;
  unsigned phase;
  std::vector<FullThread*> waiting;
};

struct Cluster;

/// A TMA copy that has not landed: the box in memory order of shared memory, and where it goes.
struct Bulk {
  std::vector<unsigned char> box;
  uint32_t smem, barrier;
  unsigned swizzle_bits;  // 0: none; else log2 of the 16-byte chunks that are exchanged
  std::vector<Block*> targets;
  Cluster* cluster;
};

/// A copy from shared to global memory (1-D or TMA): reads and writes at two random moments.
struct BulkStore {
  struct Piece {
    size_t offset;  // in the box
    unsigned char* to;
    size_t bytes;
  };
  enum { kIssued, kRead, kWritten } state = kIssued;
  FullThread* thread = nullptr;
  unsigned group = 0;
  bool waited = false;
  uint32_t smem = 0;
  size_t bytes = 0;
  unsigned swizzle_bits = 0;
  std::vector<Piece> pieces;
  std::vector<unsigned char> box;
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned arrived;
  std::vector<FullThread*> waiting;
};

struct Block {
  const Grid* grid;
  unsigned grid_idx;  // among those that run together
  Dim3 block_idx;
  Cluster* cluster;
  unsigned rank;  // in the cluster
  unsigned num_threads, live;
  std::vector<FullThread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned> runnable;  // indices of threads
  Barrier barriers[kMaxBarriers];
  std::map<uint32_t, MBarrier> mbarriers;
  std::vector<Bulk> bulks;
  std::vector<BulkStore> stores;
  std::vector<Word> words;
  unsigned copy_arrivals;  // pending ones of all threads
  Fibre main;
  unsigned last_warp;
  const void* params;
  // Shared memory: the thread-local storage of the kernel's library on this block's OS thread.
  unsigned char* shared_begin;
  unsigned char* shared_end;
  unsigned char* dynamic;
#if CUMOE_ASAN
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
#endif
};

enum Policy { kAny, kAscending, kDescending, kWarp };

struct Run {
  Policy policy;
  unsigned copy_chance;  // of 256, per pending copy and yield point
  uint8_t poison;
  int num_grids;
  int seconds;            // without progress, of processor time
  unsigned store_chance;  // of 16384, per word of a relaxed store and step
  bool turn_passed;       // by a thread of the block that has it
  uint64_t progress;      // counts what a thread may wait for, and what threads do beside polling
  uint64_t events;        // of these, the ones that no endless loop repeats
  uint64_t polls;         // since the last event
  uint64_t max_polls;     // after which the run is stuck
  std::string error;
  bool failed;
};

/// A block that is to run: where it is in its grid and in its cluster.
struct Job {
  const Grid* grid;
  unsigned grid_idx;
  const void* params;
  Dim3 index;
  Cluster* cluster;
  unsigned rank;
};

extern Random rng;
extern Run run;

/// Whether a fibre runs, and not the scheduler; an error of the scheduler's own work is thrown.
extern volatile bool on_fibre;

struct Failed {};

/// Stacks of threads that are gone.
extern std::vector<Fibre> spare_fibres;

inline FullThread* me() { return static_cast<FullThread*>(self); }

/// Errors (errors.cpp).
std::string str(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string at(Site s);
std::string grid_text(const Grid* grid, unsigned grid_idx);  // kernel, and which of several grids
std::string block_text(const Block* b);
std::string thread_text(const FullThread* t);
std::string waiting_text(const Block* b);  // what threads wait for, those of one reason together
void record(const std::string& text);

/// Turns faults of kernel code, and a run without progress, into errors while it lives.
constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGVTALRM};

struct SignalHandlers {
  struct sigaction old[sizeof kSignals / sizeof kSignals[0]];
  stack_t old_stack;
  itimerval old_timer;
  std::vector<unsigned char> stack;

  SignalHandlers();
  ~SignalHandlers();
};

/// Scheduling (scheduler.cpp).
void start(Block* b, const Job& job);
bool step(Block* b);  // runs one thread to its next yield point, or lands a copy; false if neither
void to_scheduler(bool ending = false);  // switches from a fibre to its block's scheduler

/// Whether no thread of a block can go on: all wait, or poll what nobody changes.
bool stuck(const Block* b);

/// Gives way without being runnable; make_runnable ends it.
void suspend(State state, const char* doing, Site site);
void make_runnable(FullThread* t);

/// Releases a barrier at which all have arrived (barriers.cpp).
void check_barrier(Block* b, Barrier& barrier);

/// Copies of cp.async (memory.cpp).
void complete(const Copy& c);
void complete_some(FullThread* t);     // some of this thread's, in any order
bool complete_arrivals(Block* b);      // all of a thread that others wait for; false if none
void deliver_arrivals(FullThread* t);  // arrives on mbarriers whose copies have all landed

/// Lands one or more waiting words of a block, or all (sync.cpp); there are some.
void land_words(Block* b, bool all);

/// Shared memory of a block: filled before it, checked after it (memory.cpp).
void init_shared(Block* b);
void check_guard(Block* b);

/// Asynchronous work of the hardware, called between the steps of threads (hopper.cpp, wgmma.cpp).
bool complete_bulk(Block* b);  // lands one TMA copy; false if there is none
void advance_store(Block* b);  // reads or writes for one bulk store; there is one
void end_stores(FullThread* t);
void advance_wgmma(Warp* w);  // carries out some pending operations
void arrive(Block* b, uint32_t barrier, int64_t bytes, Site site);
std::string unfinished(const Block* b);  // what may not be pending when a block ends
std::string unfinished_wgmma(const Block* b);
std::string mbarrier_text(const FullThread* t);  // state of the barrier a thread waits for

}  // namespace cumoe_host
