// Functional models of Hopper's asynchronous machinery: mbarriers, TMA loads, wgmma, clusters.
//
// mbarrier   kept beside shared memory; its word there holds a mark, so that a barrier that is not
//            initialised or was overwritten is noticed.
// TMA        the box is read when it is issued and lands, whole, at a random later moment.
// wgmma      each warp computes its 16 rows; a pending operation leaves NaN in its accumulators and
//            reads shared memory at a random moment up to its wait. Exact products, summed in
//            double and rounded once an instruction: the hardware keeps fewer bits
//            (docs/testing.md).
#include <algorithm>
#include <cmath>

#include "internal.h"
#include "numbers.h"

namespace cumoe_host {

namespace {

constexpr uint64_t kBarrierMark = 0x6d62617272696572ull;
constexpr uint64_t kMapMark = 0x637564615f6d6170ull;
constexpr int kMaxArrivals = (1 << 20) - 1;

/// The host's tensor map, as tests/host/loader.py packs it; dimension 0 is the innermost.
struct HostMap {
  uint64_t mark;
  uint64_t address;
  uint64_t strides[4];  // bytes, of dimensions 1 to 4
  uint32_t last[5];     // size - 1
  uint16_t box[5];
  uint8_t rank, itemsize, swizzle, fill_nan;
};
static_assert(sizeof(HostMap) <= 128, "a tensor map has 128 bytes");

MBarrier& find(Block* b, uint32_t address, Site site) {
  if (address % 8) fail(site, "mbarrier at shared 0x%x: not 8-byte aligned", address);
  auto it = b->mbarriers.find(address);
  if (it == b->mbarriers.end()) fail(site, "mbarrier at shared 0x%x is not initialised", address);
  uint64_t word;
  memcpy(&word, b->shared_begin + address, 8);
  if (word != kBarrierMark) fail(site, "mbarrier at shared 0x%x was overwritten", address);
  return it->second;
}

void check_phase(MBarrier& m) {
  if (m.pending != 0 || m.bytes != 0) return;
  m.phase ^= 1;
  m.pending = m.expected;
  ++run.progress;
  for (FullThread* t : m.waiting) make_runnable(t);
  m.waiting.clear();
}

/// Block `rank` of this block's cluster, which must not have ended.
Block* peer(unsigned rank, Site site) {
  Cluster* c = self->block->cluster;
  if (rank >= c->blocks.size())
    fail(site, "no block %u in a cluster of %zu", rank, c->blocks.size());
  Block* b = c->blocks[rank];
  if (b->cluster != c || b->live == 0) fail(site, "block %u of the cluster has ended", rank);
  return b;
}

}  // namespace

void arrive(Block* b, uint32_t barrier, int64_t bytes, Site site) {
  MBarrier& m = find(b, barrier, site);
  if (m.pending == 0) {
    fail(site, "mbarrier at shared 0x%x: more than %d arrivals in a phase", barrier, m.expected);
  }
  m.bytes += bytes;
  if (m.bytes > kMaxArrivals)
    fail(site, "mbarrier at shared 0x%x expects %lld bytes", barrier,
         static_cast<long long>(m.bytes));
  --m.pending;
  check_phase(m);
}

void mbarrier_init(uint32_t barrier, int arrivals, Site site) {
  Block* b = self->block;
  void* word = shared_pointer(barrier, 8, site);
  if (barrier % 8) fail(site, "mbarrier at shared 0x%x: not 8-byte aligned", barrier);
  if (arrivals < 1 || arrivals > kMaxArrivals) fail(site, "mbarrier of %d arrivals", arrivals);
  if (b->mbarriers.count(barrier) && !b->mbarriers[barrier].waiting.empty()) {
    fail(site, "mbarrier at shared 0x%x is initialised while threads wait for it", barrier);
  }
  b->mbarriers[barrier] = MBarrier{arrivals, arrivals, 0, 0, {}};
  memcpy(word, &kBarrierMark, 8);
}

void mbarrier_arrive(uint32_t barrier, int bytes, int rank, Site site) {
  yield(site);
  arrive(rank < 0 ? self->block : peer(static_cast<unsigned>(rank), site), barrier, bytes, site);
}

bool mbarrier_try_wait(uint32_t barrier, int parity, Site site) {
  FullThread* t = me();
  if (parity != 0 && parity != 1) fail(site, "mbarrier wait: parity %d", parity);
  MBarrier& m = find(t->block, barrier, site);
  if (m.phase != static_cast<unsigned>(parity)) {
    yield(site);
    return true;
  }
  m.waiting.push_back(t);
  t->pending.mask = barrier;
  t->pending.name = parity ? "1" : "0";
  suspend(State::kBarrier, "mbarrier wait", site);
  return true;
}

std::string mbarrier_text(const FullThread* t) {
  const auto it = t->block->mbarriers.find(t->pending.mask);
  if (it == t->block->mbarriers.end()) return "";
  const MBarrier& m = it->second;
  return str(" (shared 0x%x, parity %s: %d of %d arrivals and %lld bytes are missing)", it->first,
             t->pending.name, m.pending, m.expected, static_cast<long long>(m.bytes));
}

// --------------------------------------------------------------------------------------------- TMA

namespace {

const HostMap* map_of(const void* map, Site site) {
  const HostMap* m = static_cast<const HostMap*>(map);
  if (reinterpret_cast<uintptr_t>(map) % 64)
    fail(site, "tensor map at %p: not 64-byte aligned", map);
  if (m->mark != kMapMark) fail(site, "%p is no tensor map", map);
  return m;
}

/// Reads a box; elements outside of the array are the fill.
std::vector<unsigned char> read_box(const HostMap* m, const int* coordinates) {
  size_t rows = 1;
  for (int d = 1; d < m->rank; ++d) rows *= m->box[d];
  const size_t row_bytes = size_t{m->box[0]} * m->itemsize;
  std::vector<unsigned char> box(rows * row_bytes, m->fill_nan ? 0xff : 0);
  for (size_t r = 0; r < rows; ++r) {
    size_t rest = r;
    bool inside = true;
    const unsigned char* source = reinterpret_cast<const unsigned char*>(m->address);
    for (int d = 1; d < m->rank; ++d) {
      const int64_t c = int64_t{coordinates[d]} + static_cast<int64_t>(rest % m->box[d]);
      rest /= m->box[d];
      inside = inside && c >= 0 && c <= int64_t{m->last[d]};
      source += c * static_cast<int64_t>(m->strides[d - 1]);
    }
    if (!inside) continue;
    const int64_t first = coordinates[0];
    const int64_t from = std::max<int64_t>(first, 0);
    const int64_t to = std::min<int64_t>(first + m->box[0], int64_t{m->last[0]} + 1);
    if (from < to) {
      memcpy(box.data() + r * row_bytes + (from - first) * m->itemsize, source + from * m->itemsize,
             static_cast<size_t>(to - from) * m->itemsize);
    }
  }
  return box;
}

void land(const Bulk& bulk) {
  for (Block* b : bulk.targets) {
    if (b->live == 0 || b->cluster != bulk.cluster) continue;
    for (size_t i = 0; i < bulk.box.size(); i += 16) {
      uint32_t to = bulk.smem + static_cast<uint32_t>(i);
      // Chunks of 16 bytes are exchanged within a row by the address bits above it.
      to ^= (to >> 7 & ((1u << bulk.swizzle_bits) - 1u)) << 4;
      memcpy(b->shared_begin + to, bulk.box.data() + i, 16);
    }
    MBarrier& m = b->mbarriers[bulk.barrier];
    m.bytes -= static_cast<int64_t>(bulk.box.size());
    check_phase(m);
  }
}

}  // namespace

void check_tensor_map(const void* map, Site site) { map_of(map, site); }

void tma_load(uint32_t smem, const void* map, uint32_t barrier, const int* coordinates, int rank,
              unsigned cta_mask, Site site) {
  yield(site);
  Block* b = self->block;
  const HostMap* m = map_of(map, site);
  if (m->rank != rank) fail(site, "TMA load in %d dimensions with a map of %d", rank, m->rank);
  if (smem % 128) fail(site, "TMA load to shared 0x%x: not 128-byte aligned", smem);
  const unsigned row_bytes = unsigned{m->box[0]} * m->itemsize;
  if (m->swizzle && row_bytes != 16u << m->swizzle) {
    fail(site, "TMA load: rows of %u bytes with a swizzle of %u", row_bytes, 16u << m->swizzle);
  }
  Bulk bulk = {read_box(m, coordinates), smem, barrier, m->swizzle, {}, b->cluster};
  shared_pointer(smem, bulk.box.size(), site);
  if (cta_mask == 0) {
    bulk.targets.push_back(b);
  } else {
    for (unsigned r = 0; r < 16; ++r) {
      if (cta_mask >> r & 1u) bulk.targets.push_back(peer(r, site));
    }
  }
  for (Block* target : bulk.targets) find(target, barrier, site);
  b->bulks.push_back(std::move(bulk));
}

bool complete_bulk(Block* b) {
  if (b->bulks.empty()) return false;
  const size_t i = rng.below(static_cast<uint32_t>(b->bulks.size()));
  const Bulk bulk = std::move(b->bulks[i]);
  b->bulks[i] = std::move(b->bulks.back());
  b->bulks.pop_back();
  land(bulk);
  ++run.progress;
  return true;
}

// ------------------------------------------------------------------------------------------- wgmma

namespace {

struct WgmmaOperands {
  Wgmma op;
  float* d;
  Site site;
};

constexpr int kMaxN = 256;

/// Bytes of 32 of k of a row of a K-major operand with 128-byte swizzle.
const unsigned char* row_bytes_of(Block* b, uint64_t descriptor, int row, int chunk) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fffu) << 4;
  const uint32_t group = static_cast<uint32_t>(descriptor >> 32 & 0x3fffu) << 4;
  uint32_t address = start + row / 8 * group + row % 8 * 128 + chunk * 16;
  address ^= (address >> 7 & 7u) << 4;
  return b->shared_begin + address;
}

void widen(float* to, const unsigned char* bytes, int kind) {
  static float table[256];
  static const bool filled = [] {
    for (unsigned i = 0; i < 256; ++i) table[i] = from_e4m3(i);
    return true;
  }();
  (void)filled;
  if (kind == kWgmmaE4m3) {
    for (int i = 0; i < 16; ++i) to[i] = table[bytes[i]];
  } else {
    for (int i = 0; i < 8; ++i) to[i] = from_bf16(bytes[2 * i] | unsigned{bytes[2 * i + 1]} << 8);
  }
}

void execute(Warp* w, Wgmma& op) {
  Block* b = w->threads[0]->block;
  const int elements = op.kind == kWgmmaE4m3 ? 32 : 16, per_chunk = elements / 2;
  const int first_row = static_cast<int>(w->threads[0]->linear / 32 % 4) * 16;
  static float a[16][32], bt[kMaxN][32];
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 2; ++c)
      widen(a[r] + c * per_chunk, row_bytes_of(b, op.a, first_row + r, c), op.kind);
  }
  for (int n = 0; n < op.n; ++n) {
    for (int c = 0; c < 2; ++c) widen(bt[n] + c * per_chunk, row_bytes_of(b, op.b, n, c), op.kind);
  }
  std::vector<float>& values = w->accumulators[op.d[0]];
  const int per_lane = op.n / 2;
  for (int r = 0; r < 16; ++r) {
    for (int n = 0; n < op.n; ++n) {
      const int lane = r % 8 * 4 + n % 8 / 2, v = n / 8 * 4 + r / 8 * 2 + n % 2;
      float& d = values[static_cast<size_t>(lane) * kMaxN / 2 + v];
      double sum = op.accumulate ? double{d} : 0.0;
      for (int k = 0; k < elements; ++k) sum += double{a[r][k]} * bt[n][k];
      d = static_cast<float>(sum);
    }
  }
  (void)per_lane;
  op.done = true;
}

void issue(void* const* lanes, unsigned) {
  Warp* w = self->warp;
  auto* first = static_cast<WgmmaOperands*>(lanes[0]);
  Wgmma op = first->op;
  for (int l = 0; l < 32; ++l) {
    auto* o = static_cast<WgmmaOperands*>(lanes[l]);
    if (o->op.a != op.a || o->op.b != op.b || o->op.accumulate != op.accumulate) {
      fail(first->site, "wgmma: lanes 0 and %d have different descriptors or scale-d", l);
    }
    op.d[l] = o->d;
  }
  op.group = w->wgmma_group;
  std::vector<float>& values = w->accumulators[op.d[0]];
  if (values.empty()) {
    values.assign(32 * kMaxN / 2, 0.0f);
    for (int l = 0; l < 32; ++l) memcpy(&values[l * kMaxN / 2], op.d[l], op.n / 2 * sizeof(float));
  }
  for (int l = 0; l < 32; ++l) memset(op.d[l], 0xff, op.n / 2 * sizeof(float));
  w->wgmmas.push_back(op);
  advance_wgmma(w);
}

void nothing(void* const*, unsigned) {}

}  // namespace

void advance_wgmma(Warp* w) {
  for (Wgmma& op : w->wgmmas) {
    if (op.done) continue;
    if (rng.below(256) >= run.copy_chance) return;
    execute(w, op);
  }
}

void wgmma_fence(Site site) {
  collective("wgmma.fence", 0xffffffffu, nullptr, nothing, true, site);
  self->warp->wgmma_fenced = true;
}

void wgmma_mma(int kind, int n, float* d, uint64_t a, uint64_t b, bool accumulate, Site site) {
  if (!self->warp->wgmma_fenced) fail(site, "wgmma without a wgmma.fence since the last wait");
  if (n % 8 || n < 8 || n > kMaxN) fail(site, "wgmma of n = %d", n);
  const uint64_t operands[2] = {a, b};
  for (int i = 0; i < 2; ++i) {
    const uint64_t desc = operands[i];
    const uint32_t start = static_cast<uint32_t>(desc & 0x3fffu) << 4;
    if (desc >> 62 != 1) fail(site, "wgmma: only the 128-byte swizzle has a model");
    if (start & 0x380u) fail(site, "wgmma: tile at shared 0x%x is not 1024-byte aligned", start);
    const uint32_t group = static_cast<uint32_t>(desc >> 32 & 0x3fffu) << 4;
    const int rows = i == 0 ? 64 : n;
    if ((start & 0x7fu) + 32 > 128) fail(site, "wgmma: k goes past the swizzled row of 128 bytes");
    shared_pointer(start & ~0x7fu, (rows / 8 - 1) * group + 1024, site);
  }
  WgmmaOperands o = {{kind, n, a, b, accumulate, false, 0, {}}, d, site};
  collective("wgmma.mma_async", 0xffffffffu, &o, issue, true, site);
}

void wgmma_commit(Site site) {
  collective(
      "wgmma.commit_group", 0xffffffffu, nullptr,
      [](void* const*, unsigned) { ++self->warp->wgmma_group; }, true, site);
}

void wgmma_wait(unsigned pending_groups, Site site) {
  struct Pending {
    unsigned groups;
  } p = {pending_groups};
  yield(site);
  collective(
      "wgmma.wait_group", 0xffffffffu, &p,
      [](void* const* lanes, unsigned) {
        Warp* w = self->warp;
        const unsigned pending = static_cast<Pending*>(lanes[0])->groups;
        std::vector<Wgmma> left;
        std::vector<Wgmma> finished;
        for (Wgmma& op : w->wgmmas) {
          if (op.group + pending < w->wgmma_group) {
            if (!op.done) execute(w, op);
            finished.push_back(op);
          } else {
            left.push_back(op);
          }
        }
        w->wgmmas = left;
        for (const Wgmma& op : finished) {
          const auto uses = [&](const Wgmma& other) { return other.d[0] == op.d[0]; };
          if (std::any_of(left.begin(), left.end(), uses)) continue;
          const auto it = w->accumulators.find(op.d[0]);
          if (it == w->accumulators.end()) continue;
          int n = op.n;
          for (const Wgmma& other : finished) n = uses(other) ? std::max(n, other.n) : n;
          for (int l = 0; l < 32; ++l) {
            memcpy(op.d[l], &it->second[l * kMaxN / 2], n / 2 * sizeof(float));
          }
          w->accumulators.erase(it);
        }
        w->wgmma_fenced = false;
      },
      true, site);
}

std::string unfinished(const Block* b) {
  if (!b->bulks.empty()) return str("%zu TMA copies have not landed", b->bulks.size());
  for (const Warp& w : b->warps) {
    if (!w.wgmmas.empty()) return str("%zu wgmma operations were not waited for", w.wgmmas.size());
  }
  return "";
}

// ---------------------------------------------------------------------------------------- clusters

unsigned cluster_rank() { return self->block->rank; }

unsigned cluster_size() { return static_cast<unsigned>(self->block->cluster->blocks.size()); }

void* cluster_pointer(uint32_t address, unsigned rank, size_t bytes, Site site) {
  Block* b = self->block;
  unsigned char* mine = static_cast<unsigned char*>(shared_pointer(address, bytes, site));
  return peer(rank, site)->shared_begin + (mine - b->shared_begin);
}

void cluster_barrier(Site site) {
  FullThread* t = me();
  Cluster* c = t->block->cluster;
  unsigned total = 0;
  for (Block* b : c->blocks) total += b->num_threads;
  ++c->arrived;
  c->waiting.push_back(t);
  if (c->arrived == total) {
    c->arrived = 0;
    std::vector<FullThread*> all;
    all.swap(c->waiting);
    for (FullThread* other : all) {
      if (other != t) make_runnable(other);
    }
    yield(site);
    return;
  }
  suspend(State::kBarrier, "barrier.cluster", site);
}

}  // namespace cumoe_host
