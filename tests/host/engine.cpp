// Executes grids of fibres; see engine.h.
//
// Here: the order of blocks, which of the resident ones has the turn, and the entry for Python.
// scheduler.cpp   the threads of one block
// barriers.cpp    warp operations and barriers
// memory.cpp      copies of cp.async, shared memory
// hopper.cpp      mbarriers, TMA, wgmma, clusters
// errors.cpp      messages, signals, UBSan's reports
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "internal.h"

namespace cumoe_host {

Run run;

namespace {

/// A resident block's OS thread and the token that says which of them runs.
struct Worker {
  pthread_t thread;
  sem_t go, gave_way;
  Block block;
  bool busy = false;  // has a block
  bool quit = false;
  const Job* next = nullptr;
  unsigned steps = 0;
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
    run.turn_passed = false;
    for (unsigned i = 0; i < w->steps && !run.failed && w->block.live && step(&w->block); ++i) {
      if (run.turn_passed) break;
    }
    // Sooner or later always: another block may wait for the data.
    if (!w->block.words.empty() && rng.below(16) == 0) land_words(&w->block, false);
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
  for (const Job& job : jobs) {
    start(&block, job);
    for (unsigned steps = 0; block.live && !run.failed; ++steps) {
      if (!step(&block)) {
        record("deadlock in " + block_text(&block) + ":" + waiting_text(&block));
      } else if (block.live &&
                 (run.polls > run.max_polls || (steps % 4096 == 0 && stuck(&block)))) {
        record("deadlock, all threads poll, in " + block_text(&block) + ":" + waiting_text(&block));
      }
    }
    if (run.failed) return;
    check_guard(&block);
  }
}

/// Keeps this thread, and those it makes, on the processor where it is: turns are handed over at a
/// fraction of the cost, and only one thread runs at a time anyway.
struct OneProcessor {
  cpu_set_t old;
  bool pinned = false;

  OneProcessor() {
    const int cpu = sched_getcpu();
    if (cpu < 0 || sched_getaffinity(0, sizeof old, &old)) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(static_cast<unsigned>(cpu), &one);
    pinned = sched_setaffinity(0, sizeof one, &one) == 0;
  }
  ~OneProcessor() {
    if (pinned) sched_setaffinity(0, sizeof old, &old);
  }
};

/// The blocks of one grid in the order in which they start, clusters in one piece.
struct Queue {
  const Grid* grid;
  std::vector<Job> jobs;
  unsigned resident;              // blocks that may be alive
  const Queue* before = nullptr;  // of the same stream: it ends first
  size_t started = 0, ended = 0;
  uint64_t first_turn = 0;  // before which no block starts
  unsigned pace = 1;        // of its blocks' turns one in so many is taken

  bool may_start() const {
    return started < jobs.size() && (!before || before->ended == before->jobs.size()) &&
           started - ended + jobs[started].cluster->blocks.size() <= resident;
  }
};

std::string all_waiting(const std::vector<Queue>& queues, const std::vector<Worker*>& busy) {
  std::string text = "deadlock:";
  for (const Worker* w : busy) text += "\n" + block_text(&w->block) + ":" + waiting_text(&w->block);
  for (size_t g = 0; g < queues.size(); ++g) {
    const Queue& q = queues[g];
    if (q.ended) {
      text += "\n" + grid_text(q.grid, static_cast<unsigned>(g)) +
              str(": %zu of %zu blocks have ended", q.ended, q.jobs.size());
    }
    if (q.started < q.jobs.size() && (!q.before || q.before->ended == q.before->jobs.size())) {
      text += "\n" + grid_text(q.grid, static_cast<unsigned>(g)) +
              str(": %zu of %zu blocks have not started, because %u are resident at a time",
                  q.jobs.size() - q.started, q.jobs.size(), q.resident);
    }
  }
  return text;
}

/// Streams at the same time, some blocks of each, in random turns. Some seeds start a grid late and
/// let one stream crawl, as ranks of a job do.
void run_together(std::vector<Queue>& queues) {
  const OneProcessor pinned;
  size_t num_workers = 0, of_stream = 0;
  const bool skewed = queues.size() > 1;
  for (Queue& q : queues) {
    if (!q.before) num_workers += std::exchange(of_stream, 0);
    of_stream = std::max(of_stream, std::min<size_t>(q.resident, q.jobs.size()));
    if (skewed && rng.below(2)) q.first_turn = rng.below(400);
  }
  num_workers += of_stream;
  if (skewed && rng.below(2)) {
    const int slow = queues[rng.below(static_cast<uint32_t>(queues.size()))].grid->stream;
    for (Queue& q : queues) q.pace = q.grid->stream == slow ? 16 : 1;
  }
  std::vector<Worker> workers(num_workers);
  for (Worker& w : workers) {
    sem_init(&w.go, 0, 0);
    sem_init(&w.gave_way, 0, 0);
    pthread_create(&w.thread, nullptr, worker_main, &w);
  }
  const auto turn_of = [](Worker* w, unsigned steps) {
    w->steps = steps;
    sem_post(&w->go);
    sem_wait(&w->gave_way);
  };
  const auto is_stuck = [](const Worker* w) { return stuck(&w->block); };
  for (uint64_t turn = 0; !run.failed; ++turn) {
    std::vector<Worker*> busy, free_workers;
    for (Worker& w : workers) (w.busy ? busy : free_workers).push_back(&w);
    bool waiting = false;
    for (Queue& q : queues) {
      waiting |= q.may_start() && turn < q.first_turn;
      while (q.may_start() && turn >= q.first_turn) {
        // The blocks of a cluster start together, so each finds the others' shared memory.
        for (size_t n = q.jobs[q.started].cluster->blocks.size(); n > 0; --n) {
          Worker* w = free_workers.back();
          free_workers.pop_back();
          w->next = &q.jobs[q.started++];
          w->busy = true;
          turn_of(w, 0);
          busy.push_back(w);
        }
      }
    }
    if (busy.empty()) {
      if (!waiting) break;
      continue;
    }
    const auto any = [&] { return busy[rng.below(static_cast<uint32_t>(busy.size()))]; };
    Worker* w = any();
    if (rng.below(queues[w->block.grid_idx].pace)) w = any();
    turn_of(w, 1 + rng.below(rng.below(4) ? 64 : 4096));
    if (w->block.live == 0) {
      w->busy = false;
      ++queues[w->block.grid_idx].ended;
      note_event();
    } else if (!waiting && (run.polls > run.max_polls ||
                            (turn % 8 == 0 && std::all_of(busy.begin(), busy.end(), is_stuck)))) {
      record(all_waiting(queues, busy));
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

}  // namespace cumoe_host

using namespace cumoe_host;

/// Blocks of a cluster: of the kernel's own attribute, or else of the launch.
static Dim3 cluster_of(const Grid& grid) {
  return grid.kernel->cluster.x ? grid.kernel->cluster : grid.cluster;
}

namespace {

/// A copy of a grid's parameters, aligned as a kernel's parameters are.
struct Params {
  alignas(128) unsigned char bytes[4096];
};

/// The clusters of a grid in random order: the hardware promises none.
Queue queue_of(const Grid& grid, unsigned grid_idx, const void* params, unsigned resident,
               std::vector<std::unique_ptr<Cluster>>& owned) {
  const Dim3 c = cluster_of(grid), n = {grid.grid.x / c.x, grid.grid.y / c.y, grid.grid.z / c.z};
  const unsigned size = c.x * c.y * c.z;
  std::vector<unsigned> order(n.x * n.y * n.z);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[rng.below(static_cast<uint32_t>(i))]);
  }
  Queue q;
  q.grid = &grid;
  q.resident = std::max(resident, size);
  for (unsigned i : order) {
    const Dim3 first = {i % n.x * c.x, i / n.x % n.y * c.y, i / n.x / n.y * c.z};
    owned.push_back(std::make_unique<Cluster>());
    owned.back()->blocks.resize(size);
    for (unsigned r = 0; r < size; ++r) {
      const Dim3 index = {first.x + r % c.x, first.y + r / c.x % c.y, first.z + r / c.x / c.y};
      q.jobs.push_back({&grid, grid_idx, params, index, owned.back().get(), r});
    }
  }
  return q;
}

/// Why a grid cannot run, or nothing.
std::string refusal(const Grid& grid) {
  const Dim3 c = cluster_of(grid);
  const char* reason = nullptr;
  if (grid.kernel->params_bytes > sizeof(Params))
    reason = "its parameters have more than 4096 bytes";
  if (grid.smem_bytes > grid.kernel->dynamic_capacity) reason = "too much dynamic shared memory";
  if (grid.grid.x % c.x || grid.grid.y % c.y || grid.grid.z % c.z) {
    reason = "the cluster does not divide the grid";
  }
  return reason ? str("kernel %s: %s", grid.kernel->name, reason) : "";
}

}  // namespace

extern "C" int cumoe_host_run(const Grid* grids, int num_grids, int resident, uint64_t seed,
                              int seconds, char* message, size_t message_bytes) {
  rng.state = seed;
  run = Run{};
  run.num_grids = num_grids;
  run.seconds = seconds;
  run.policy = static_cast<Policy>(seed % 4);
  const unsigned chances[] = {0, 8, 64, 256};
  run.copy_chance = chances[seed / 4 % 4];
  const unsigned store_chances[] = {1, 16, 256, 4096};
  run.store_chance = store_chances[seed / 4 % 4];
  const uint8_t poisons[] = {0xff, 0xa5, 0x7f};
  run.poison = poisons[seed % 3];
  std::vector<Params> params(static_cast<size_t>(num_grids));
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Queue> queues;
  queues.reserve(params.size());
  for (unsigned g = 0; g < params.size(); ++g) {
    const std::string reason = refusal(grids[g]);
    if (!reason.empty()) {
      snprintf(message, message_bytes, "%s", reason.c_str());
      return 1;
    }
    memcpy(params[g].bytes, grids[g].params, grids[g].kernel->params_bytes);
    const bool first = g == 0 || grids[g].stream != grids[g - 1].stream;
    const unsigned at_a_time = resident > 0 ? static_cast<unsigned>(resident) : ~0u;
    queues.push_back(queue_of(grids[g], g, params[g].bytes, at_a_time, clusters));
    if (!first) queues[g].before = &queues[g - 1];
  }
  run.max_polls = 4000000;
  for (const Queue& q : queues) {
    const Dim3 block = q.grid->block;
    run.max_polls +=
        4000ull * block.x * block.y * block.z * std::min<uint64_t>(q.resident, q.jobs.size());
  }
  {
    SignalHandlers handlers;
    if (num_grids > 1 || queues[0].resident > 1) {
      run_together(queues);
    } else {
      run_in_turn(queues[0].jobs);
    }
  }
  if (!run.failed) return 0;
  snprintf(message, message_bytes, "%s (seed %llu)", run.error.c_str(),
           static_cast<unsigned long long>(seed));
  return 1;
}
