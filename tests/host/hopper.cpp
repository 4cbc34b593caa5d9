// Functional models of Hopper's asynchronous machinery: mbarriers, bulk copies, clusters.
//
// mbarrier   kept beside shared memory; its word there holds a mark, so that a barrier that is not
//            initialised or was overwritten is noticed.
// TMA        the box is read when it is issued and lands, whole, at a random later moment.
#include <algorithm>

#include "internal.h"

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
  note_event();
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
  poll("mbarrier try_wait", site);
  if (parity != 0 && parity != 1) fail(site, "mbarrier wait: parity %d", parity);
  return find(me()->block, barrier, site).phase != static_cast<unsigned>(parity);
}

void mbarrier_wait(uint32_t barrier, int parity, Site site) {
  FullThread* t = me();
  if (parity != 0 && parity != 1) fail(site, "mbarrier wait: parity %d", parity);
  MBarrier& m = find(t->block, barrier, site);
  if (m.phase != static_cast<unsigned>(parity)) {
    yield(site);
    return;
  }
  m.waiting.push_back(t);
  t->pending.mask = barrier;
  t->pending.name = parity ? "1" : "0";
  suspend(State::kBarrier, "mbarrier wait", site);
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

size_t row_bytes(const HostMap* m) { return size_t{m->box[0]} * m->itemsize; }

size_t box_bytes(const HostMap* m) {
  size_t bytes = row_bytes(m);
  for (int d = 1; d < m->rank; ++d) bytes *= m->box[d];
  return bytes;
}

/// Calls f(offset in the box, address, bytes) for the part of every row that lies in the array.
template <class F>
void each_row(const HostMap* m, const int* coordinates, F&& f) {
  const size_t rows = box_bytes(m) / row_bytes(m);
  for (size_t r = 0; r < rows; ++r) {
    size_t rest = r;
    bool inside = true;
    unsigned char* row = reinterpret_cast<unsigned char*>(m->address);
    for (int d = 1; d < m->rank; ++d) {
      const int64_t c = int64_t{coordinates[d]} + static_cast<int64_t>(rest % m->box[d]);
      rest /= m->box[d];
      inside = inside && c >= 0 && c <= int64_t{m->last[d]};
      row += c * static_cast<int64_t>(m->strides[d - 1]);
    }
    const int64_t first = coordinates[0];
    const int64_t from = std::max<int64_t>(first, 0);
    const int64_t to = std::min<int64_t>(first + m->box[0], int64_t{m->last[0]} + 1);
    if (!inside || from >= to) continue;
    f(r * row_bytes(m) + static_cast<size_t>(from - first) * m->itemsize, row + from * m->itemsize,
      static_cast<size_t>(to - from) * m->itemsize);
  }
}

/// Where a byte of a box lies: chunks of 16 bytes are exchanged by the address bits above the row.
uint32_t swizzled(uint32_t smem, size_t offset, unsigned swizzle_bits) {
  const uint32_t address = smem + static_cast<uint32_t>(offset);
  return address ^ (address >> 7 & ((1u << swizzle_bits) - 1u)) << 4;
}

/// Checks what loads and stores have in common.
const HostMap* check_box(const char* what, const void* map, uint32_t smem, int rank, Site site) {
  const HostMap* m = map_of(map, site);
  if (m->rank != rank) fail(site, "%s in %d dimensions with a map of %d", what, rank, m->rank);
  if (smem % 128) fail(site, "%s at shared 0x%x: not 128-byte aligned", what, smem);
  if (m->swizzle && row_bytes(m) != 16u << m->swizzle) {
    fail(site, "%s: rows of %zu bytes with a swizzle of %u", what, row_bytes(m), 16u << m->swizzle);
  }
  shared_pointer(smem, box_bytes(m), site);
  return m;
}

void land(const Bulk& bulk) {
  for (Block* b : bulk.targets) {
    if (b->live == 0 || b->cluster != bulk.cluster) continue;
    for (size_t i = 0; i < bulk.box.size(); i += 16) {
      const uint32_t to = swizzled(bulk.smem, i, bulk.swizzle_bits);
      memcpy(b->shared_begin + to, bulk.box.data() + i, std::min<size_t>(bulk.box.size() - i, 16));
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
  const HostMap* m = check_box("TMA load", map, smem, rank, site);
  Bulk bulk = {{}, smem, barrier, m->swizzle, {}, b->cluster};
  bulk.box.assign(box_bytes(m), m->fill_nan ? 0xff : 0);
  each_row(m, coordinates, [&](size_t offset, const unsigned char* from, size_t bytes) {
    memcpy(bulk.box.data() + offset, from, bytes);
  });
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

void store_async(uint32_t address, uint32_t barrier, unsigned rank, uint32_t value, Site site) {
  yield(site);
  shared_pointer(address, 4, site);
  if (address % 4) fail(site, "st.async to shared 0x%x: not aligned", address);
  Block* target = peer(rank, site);
  find(target, barrier, site);
  Bulk bulk = {{}, address, barrier, 0, {target}, self->block->cluster};
  bulk.box.resize(4);
  memcpy(bulk.box.data(), &value, 4);
  target->bulks.push_back(std::move(bulk));  // it may land when this block has ended
}

bool complete_bulk(Block* b) {
  if (b->bulks.empty()) return false;
  const size_t i = rng.below(static_cast<uint32_t>(b->bulks.size()));
  const Bulk bulk = std::move(b->bulks[i]);
  b->bulks[i] = std::move(b->bulks.back());
  b->bulks.pop_back();
  land(bulk);
  note_event();
  return true;
}

// ------------------------------------------------------------------------------------- bulk stores

namespace {

void read(Block* b, BulkStore& s) {
  s.box.resize(s.bytes);
  for (size_t i = 0; i < s.bytes; i += 16) {
    memcpy(&s.box[i], b->shared_begin + swizzled(s.smem, i, s.swizzle_bits), 16);
  }
  s.state = BulkStore::kRead;
}

void write(BulkStore& s) {
  for (const BulkStore::Piece& p : s.pieces) memcpy(p.to, &s.box[p.offset], p.bytes);
  s.state = BulkStore::kWritten;
  note_event();
}

void add_store(BulkStore&& s, Site site) {
  FullThread* t = me();
  // A bad address is an error of this line, not of the moment at which the copy lands.
  for (const BulkStore::Piece& p : s.pieces) {
    for (size_t i = 0; i < p.bytes; i += 4096) (void)*const_cast<volatile unsigned char*>(p.to + i);
    (void)*const_cast<volatile unsigned char*>(p.to + p.bytes - 1);
  }
  s.thread = t;
  s.group = t->store_group;
  t->block->stores.push_back(std::move(s));
  yield(site);
}

/// The stores of this thread in groups of which at most `pending_groups` were committed later.
template <class F>
void each_covered(unsigned pending_groups, F&& f) {
  FullThread* t = me();
  for (BulkStore& s : t->block->stores) {
    if (s.thread == t && s.group + pending_groups < t->store_group) f(s);
  }
}

}  // namespace

void bulk_store(void* gmem, uint32_t smem, int bytes, Site site) {
  me()->site = site;
  const uintptr_t to = reinterpret_cast<uintptr_t>(gmem);
  if (bytes <= 0 || bytes % 16) fail(site, "cp.async.bulk of %d bytes", bytes);
  if (smem % 16 || to % 16) {
    fail(site, "cp.async.bulk from shared 0x%x to %p: not 16-byte aligned", smem, gmem);
  }
  const size_t count = static_cast<size_t>(bytes);
  shared_pointer(smem, count, site);
  BulkStore s;
  s.smem = smem;
  s.bytes = count;
  s.pieces.push_back({0, static_cast<unsigned char*>(gmem), count});
  add_store(std::move(s), site);
}

void tma_store(const void* map, uint32_t smem, const int* coordinates, int rank, Site site) {
  me()->site = site;
  const HostMap* m = check_box("TMA store", map, smem, rank, site);
  BulkStore s;
  s.smem = smem;
  s.bytes = box_bytes(m);
  s.swizzle_bits = m->swizzle;
  each_row(m, coordinates, [&](size_t offset, unsigned char* to, size_t bytes) {
    s.pieces.push_back({offset, to, bytes});
  });
  add_store(std::move(s), site);
}

void bulk_commit(Site site) {
  me()->site = site;
  ++me()->store_group;
}

void bulk_wait(unsigned pending_groups, bool read_only, Site site) {
  FullThread* t = me();
  yield(site);
  each_covered(pending_groups, [&](BulkStore& s) {
    if (s.state == BulkStore::kIssued) read(t->block, s);
    if (s.state == BulkStore::kRead && !read_only) write(s);
    s.waited = true;
  });
  auto& all = t->block->stores;
  const auto done = [](const BulkStore& s) { return s.waited && s.state == BulkStore::kWritten; };
  all.erase(std::remove_if(all.begin(), all.end(), done), all.end());
}

void advance_store(Block* b) {
  BulkStore& s = b->stores[rng.below(static_cast<uint32_t>(b->stores.size()))];
  if (s.state == BulkStore::kIssued) {
    read(b, s);
  } else if (s.state == BulkStore::kRead) {
    write(s);
  }
}

void end_stores(FullThread* t) {
  auto& all = t->block->stores;
  size_t open = 0;
  for (BulkStore& s : all) {
    if (s.thread != t) continue;
    open += !s.waited;
    if (s.waited && s.state == BulkStore::kRead) write(s);
  }
  all.erase(std::remove_if(all.begin(), all.end(), [&](auto& s) { return s.thread == t; }),
            all.end());
  if (open) {
    record(thread_text(t) + str(" ends, but %zu bulk stores were not waited for, at least until "
                                "they have read shared memory",
                                open));
  }
}

// ---------------------------------------------------------------------------------- ends of blocks

std::string unfinished(const Block* b) {
  if (!b->bulks.empty()) return str("%zu TMA copies have not landed", b->bulks.size());
  return unfinished_wgmma(b);
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
  if (!t->block->words.empty()) land_words(t->block, true);
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
