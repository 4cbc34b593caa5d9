// Functional model of wgmma, one warp (16 of the 64 rows) at a time.
//
// An operation carries out between its issue and the wait that covers its group, in order, and reads
// shared memory only then. From issue to wait its accumulators hold poison (NaN), so that a register
// that is read too early shows, and one that is written shows at the wait. Products are exact, summed
// in double and rounded once an instruction: the hardware keeps fewer bits (docs/testing.md).
#include <algorithm>

#include "internal.h"
#include "numbers.h"

namespace cumoe_host {

namespace {

constexpr int kMaxN = 256;
constexpr unsigned char kPoison = 0xff;

struct Operands {
  Wgmma op;
  float* d;
};

/// 16 bytes of a row of a K-major operand with 128-byte swizzle.
const unsigned char* chunk_of(const Block* b, uint64_t descriptor, int row, int chunk) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fffu) << 4;
  const uint32_t group = static_cast<uint32_t>(descriptor >> 32 & 0x3fffu) << 4;
  uint32_t address = start + row / 8 * group + row % 8 * 128 + chunk * 16;
  address ^= (address >> 7 & 7u) << 4;
  return b->shared_begin + address;
}

/// Widens 32 bytes of a row, `stride` doubles apart.
void widen(double* to, int stride, const Block* b, uint64_t descriptor, int row, int kind) {
  static double table[256];
  static const bool filled = [] {
    for (unsigned i = 0; i < 256; ++i) table[i] = from_e4m3(i);
    return true;
  }();
  (void)filled;
  for (int c = 0; c < 2; ++c) {
    const unsigned char* bytes = chunk_of(b, descriptor, row, c);
    if (kind == kWgmmaE4m3) {
      for (int i = 0; i < 16; ++i) to[(16 * c + i) * stride] = table[bytes[i]];
    } else {
      for (int i = 0; i < 8; ++i) {
        to[(8 * c + i) * stride] = from_bf16(bytes[2 * i] | unsigned{bytes[2 * i + 1]} << 8);
      }
    }
  }
}

void execute(Warp* w, Wgmma& op) {
  const Block* b = w->threads[0]->block;
  const int num_k = op.kind == kWgmmaE4m3 ? 32 : 16;
  const int first_row = static_cast<int>(w->threads[0]->linear / 32 % 4) * 16;
  static double a[16][32], bt[32][kMaxN];
  for (int r = 0; r < 16; ++r) widen(a[r], 1, b, op.a, first_row + r, op.kind);
  for (int n = 0; n < op.n; ++n) widen(&bt[0][n], kMaxN, b, op.b, n, op.kind);
  std::vector<float>& values = w->accumulators.at(op.d[0]).values;
  for (int r = 0; r < 16; ++r) {
    double sum[kMaxN];
    float* at[kMaxN];
    for (int n = 0; n < op.n; ++n) {
      const int lane = r % 8 * 4 + n % 8 / 2, v = n / 8 * 4 + r / 8 * 2 + n % 2;
      at[n] = &values[static_cast<size_t>(lane * op.n / 2 + v)];
      sum[n] = op.accumulate ? *at[n] : 0.0;
    }
    for (int k = 0; k < num_k; ++k) {
      for (int n = 0; n < op.n; ++n) sum[n] += a[r][k] * bt[k][n];
    }
    for (int n = 0; n < op.n; ++n) *at[n] = static_cast<float>(sum[n]);
  }
  op.done = true;
}

/// Takes the accumulators over from the registers, unless an earlier operation has them.
void take_accumulators(Warp* w, const Wgmma& op) {
  const size_t bytes = static_cast<size_t>(op.n) / 2 * sizeof(float);
  for (const auto& [other, held] : w->accumulators) {
    if (other == op.d[0] && held.n == op.n) return;
    const float* end = other + held.n / 2;
    if (op.d[0] < end && other < op.d[0] + op.n / 2) {
      fail(me()->site, "wgmma of n = %d on registers of one of n = %d that is in flight", op.n,
           held.n);
    }
  }
  const auto free_since = w->wgmma_released.find(op.d[0]);
  if (w->wgmma_fences == 0 ||
      (free_since != w->wgmma_released.end() && free_since->second == w->wgmma_fences)) {
    fail(me()->site, "wgmma without a wgmma.fence since its accumulators were free");
  }
  Accumulators& held = w->accumulators[op.d[0]];
  held.n = op.n;
  held.values.resize(32 * bytes / sizeof(float));
  for (int l = 0; l < 32; ++l) {
    memcpy(&held.values[l * bytes / sizeof(float)], op.d[l], bytes);
    memset(op.d[l], kPoison, bytes);
  }
}

void issue(void* const* lanes, unsigned) {
  Warp* w = self->warp;
  Wgmma op = static_cast<Operands*>(lanes[0])->op;
  for (int l = 0; l < 32; ++l) {
    auto* o = static_cast<Operands*>(lanes[l]);
    if (o->op.a != op.a || o->op.b != op.b || o->op.accumulate != op.accumulate) {
      fail(me()->site, "wgmma: lanes 0 and %d have different descriptors or scale-d", l);
    }
    op.d[l] = o->d;
  }
  take_accumulators(w, op);
  op.group = w->wgmma_group;
  w->wgmmas.push_back(op);
  // All four warps of the group have to issue the same, see unfinished_wgmma.
  const uint64_t words[] = {op.a, op.b, static_cast<uint64_t>(op.n) << 8 | op.accumulate};
  for (uint64_t word : words) w->wgmma_trace = (w->wgmma_trace ^ word) * 0x9e3779b97f4a7c15ull;
  advance_wgmma(w);
}

/// Gives the registers of finished operations back.
void release(Warp* w, const std::vector<Wgmma>& finished) {
  for (const Wgmma& op : finished) {
    const auto uses = [&](const Wgmma& other) { return other.d[0] == op.d[0]; };
    const auto held = w->accumulators.find(op.d[0]);
    if (held == w->accumulators.end() || std::any_of(w->wgmmas.begin(), w->wgmmas.end(), uses)) {
      continue;
    }
    const int count = held->second.n / 2;
    for (int l = 0; l < 32; ++l) {
      const auto* bytes = reinterpret_cast<const unsigned char*>(op.d[l]);
      const auto poisoned = [](unsigned char byte) { return byte == kPoison; };
      if (!std::all_of(bytes, bytes + count * sizeof(float), poisoned)) {
        fail(me()->site, "registers of a wgmma were written by lane %d before this wait", l);
      }
      memcpy(op.d[l], &held->second.values[l * count], count * sizeof(float));
    }
    w->accumulators.erase(held);
    w->wgmma_released[op.d[0]] = w->wgmma_fences;
  }
}

void wait(void* const* lanes, unsigned) {
  Warp* w = self->warp;
  const unsigned pending = *static_cast<const unsigned*>(lanes[0]);
  std::vector<Wgmma> finished, left;
  for (Wgmma& op : w->wgmmas) {
    const bool covered = op.group + pending < w->wgmma_group;
    if (covered && !op.done) execute(w, op);
    (covered ? finished : left).push_back(op);
  }
  w->wgmmas = left;
  release(w, finished);
}

}  // namespace

void advance_wgmma(Warp* w) {
  for (Wgmma& op : w->wgmmas) {
    if (op.done) continue;
    if (rng.below(256) >= run.copy_chance) return;
    execute(w, op);
  }
}

void wgmma_fence(Site site) {
  collective(
      "wgmma.fence", 0xffffffffu, nullptr,
      [](void* const*, unsigned) { ++self->warp->wgmma_fences; }, true, site);
}

void wgmma_mma(int kind, int n, float* d, uint64_t a, uint64_t b, bool accumulate, Site site) {
  FullThread* t = me();
  t->site = site;
  if (t->linear / 128 * 128 + 128 > t->block->num_threads) {
    fail(site, "wgmma in a warpgroup of less than four warps");
  }
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
  Operands o = {{kind, n, a, b, accumulate, false, 0, {}}, d};
  collective("wgmma.mma_async", 0xffffffffu, &o, issue, true, site);
}

void wgmma_commit(Site site) {
  collective(
      "wgmma.commit_group", 0xffffffffu, nullptr,
      [](void* const*, unsigned) { ++self->warp->wgmma_group; }, true, site);
}

void wgmma_wait(unsigned pending_groups, Site site) {
  yield(site);
  collective("wgmma.wait_group", 0xffffffffu, &pending_groups, wait, true, site);
}

std::string unfinished_wgmma(const Block* b) {
  for (size_t i = 0; i < b->warps.size(); ++i) {
    const Warp& w = b->warps[i];
    if (!w.wgmmas.empty()) return str("%zu wgmma operations were not waited for", w.wgmmas.size());
    if (w.wgmma_trace != b->warps[i / 4 * 4].wgmma_trace) {
      return str("warps %zu and %zu of a warpgroup issued different wgmma", i / 4 * 4, i);
    }
  }
  return "";
}

}  // namespace cumoe_host
