// Executes grids of fibres; see engine.h.
//
// Here: the order of blocks, which of the resident ones has the turn, and the entry for Python.
// scheduler.cpp   the threads of one block
// barriers.cpp    warp operations and barriers
// memory.cpp      copies of cp.async, shared memory
// hopper.cpp      mbarriers, TMA, wgmma, clusters
// errors.cpp      messages, signals, UBSan's reports
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>

#include <algorithm>
#include <memory>

#include "internal.h"

namespace cumoe_host {

Run run;

namespace {

alignas(128) unsigned char params_copy[8][4096];

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
