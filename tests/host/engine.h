// What a kernel compiled for the CPU sees of the engine that executes it (engine.cpp).
//
// A CUDA thread is a fibre. Exactly one fibre runs at a time; it gives way only inside the
// functions declared here, to a fibre drawn at random from a seed. Blocks that are resident
// together (clusters, several grids) have one OS thread each, so that `thread_local` is per-block
// storage, but still run one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cumoe_host {

/// A source position; default arguments give the caller's.
struct Site {
  const char* file;
  int line;
};
#define CUMOE_SITE ::cumoe_host::Site site = {__builtin_FILE(), __builtin_LINE()}

struct Dim3 {
  unsigned x, y, z;
};

struct Block;
struct Warp;

/// One CUDA thread.
struct Thread {
  Dim3 thread_idx;
  unsigned linear;
  unsigned lane;
  Warp* warp;
  Block* block;
  Dim3 block_idx, block_dim, grid_dim;
};

/// The thread that runs now.
extern Thread* self;

/// Ends the run: `text` and who was where become the error that Python raises. Does not return.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

/// Lets other threads run; asynchronous operations may complete.
void yield(Site site);

/// Says that something changed for which another thread may wait in a loop.
void note_event();

/// As yield, perhaps to another block.
void pass_turn(Site site);

/// As yield, perhaps in a loop that waits for another thread to change what is at `address`; a run
/// in which all threads poll is a deadlock.
void poll(const char* what, Site site, const void* address = nullptr);

/// Every lane of `mask` gives a pointer to its operands; the last to come applies the operation to
/// all. Lanes outside the mask have null pointers. An `aligned` operation wants one source line
/// for all.
using Apply = void (*)(void* const* lanes, unsigned mask);
void collective(const char* name, unsigned mask, void* operands, Apply apply, bool aligned,
                Site site);

/// Lanes of this thread's warp that have not exited.
unsigned active_lanes();

/// Named barrier: waits for, or only counts, `count` threads; 0 means all threads of the block.
void barrier(const char* name, int id, unsigned count, bool wait, Site site);

/// 32-bit shared-memory address of a pointer into this block's shared memory, and back.
/// `shared_pointer` fails unless [address, address + bytes) lies in shared memory.
uint32_t shared_address(const void* pointer, Site site);
void* shared_pointer(uint32_t address, size_t bytes, Site site);

/// Asynchronous copies of one thread: the destination is written at some moment before the wait
/// ends.
void async_copy(void* destination, const void* source, unsigned bytes, unsigned zeros, Site site);
void async_commit(Site site);
void async_arrive(uint32_t barrier, Site site);
void async_wait(unsigned pending_groups, Site site);

/// mbarriers, by shared address. `rank` names a block of the cluster, -1 this block.
void mbarrier_init(uint32_t barrier, int arrivals, Site site);
void mbarrier_arrive(uint32_t barrier, int bytes, int rank, Site site);
bool mbarrier_try_wait(uint32_t barrier, int parity, Site site);  // may give up at once
void mbarrier_wait(uint32_t barrier, int parity, Site site);

/// TMA: `coordinates` innermost first; a mask of 0 means this block alone.
void check_tensor_map(const void* map, Site site);
void tma_load(uint32_t smem, const void* map, uint32_t barrier, const int* coordinates, int rank,
              unsigned cta_mask, Site site);

/// Copies from shared to global memory, in groups of the thread.
void bulk_store(void* gmem, uint32_t smem, int bytes, Site site);
void tma_store(const void* map, uint32_t smem, const int* coordinates, int rank, Site site);
void bulk_commit(Site site);
void bulk_wait(unsigned pending_groups, bool read_only, Site site);

/// wgmma on 16 rows a warp; the accumulators are poison from the operation to its wait.
constexpr int kWgmmaE4m3 = 0, kWgmmaBf16 = 1;
void wgmma_fence(Site site);
void wgmma_mma(int kind, int n, float* d, uint64_t a, uint64_t b, bool accumulate, Site site);
void wgmma_commit(Site site);
void wgmma_wait(unsigned pending_groups, Site site);

/// Memory that grids share (sync.cpp): words of four bytes.
void relaxed_store(const char* name, void* gmem, const uint32_t* words, int count, Site site);
void release_store(const char* name, uint32_t* gmem, uint32_t value, Site site);
uint32_t release_add(const char* name, uint32_t* gmem, uint32_t value, Site site);
void shared_load(const char* name, const void* gmem, uint32_t* words, int count, Site site);
void full_fence(Site site);

/// Lands the relaxed stores to these bytes that come before this moment: an access to them follows.
void settle(const void* address, size_t bytes);

/// From now on a release by any thread of the block covers this thread's relaxed stores.
void hand_over();

/// Clusters and distributed shared memory.
unsigned cluster_rank();
unsigned cluster_size();
/// Stores a word to a block of the cluster at a random later moment, and completes it on a barrier there.
void store_async(uint32_t address, uint32_t barrier, unsigned rank, uint32_t value, Site site);
void* cluster_pointer(uint32_t address, unsigned rank, size_t bytes, Site site);
void cluster_barrier(Site site);

/// Random bits from the run's seed.
uint32_t random_bits();

/// What a kernel library tells the engine.
struct Kernel {
  const char* name;
  void (*entry)(const void* params);
  size_t params_bytes;
  unsigned char* (*dynamic_smem)();  // start of the block's dynamic shared memory
  size_t dynamic_capacity;
  Dim3 cluster;  // __cluster_dims__, or zeros
};

/// One launch.
struct Grid {
  const Kernel* kernel;
  const void* params;
  Dim3 grid, block, cluster;
  size_t smem_bytes;
  int stream;  // grids of one stream run in the order in which they are given
};

}  // namespace cumoe_host

extern "C" {
/// Runs grids together, those of one stream in turn, `resident` blocks of each at a time (0: all). A single grid with 1 runs its blocks one
/// after the other. A thread that runs for `seconds` of processor time without an event is an error.
/// Returns 0, or 1 with a message.
int cumoe_host_run(const cumoe_host::Grid* grids, int num_grids, int resident, uint64_t seed,
                   int seconds, char* message, size_t message_bytes);
}
