// Functional model of accesses to memory that several grids share (cumoe/cu/sync.cuh).
//
// A relaxed store waits, word by word, until it lands at a random moment: in any order with other
// addresses, in program order at its own. A release, or a fence, lands the words of its thread and
// those that others handed over at a barrier before it. A load takes words one by one, at different
// moments. So a missing release, and a payload of which not every word was checked, can be seen;
// loads are never early, so a missing acquire cannot.
#include <algorithm>

#include "internal.h"

namespace cumoe_host {

namespace {

constexpr size_t kMaxWords = 1024;  // that wait in a block; beyond, some land

void land(Block* b, size_t i) {
  const Word w = b->words[i];
  b->words[i] = b->words.back();
  b->words.pop_back();
  *w.to = w.value;
  note_event();
}

/// Lands what must be there before a release of thread `t`, in random order.
void release(FullThread* t, Site site) {
  Block* b = t->block;
  std::vector<uint32_t*> order;
  for (const Word& w : b->words) {
    if (w.owner == t || w.handed_over) order.push_back(w.to);
  }
  for (size_t i = order.size(); i > 0; --i) {
    std::swap(order[i - 1], order[rng.below(static_cast<uint32_t>(i))]);
    settle(order[i - 1], sizeof(uint32_t));
    if (rng.below(4 + i) == 0) pass_turn(site);
  }
}

/// Checks an address; a bad one is an error of this line, not of the moment a store lands.
void check(const char* name, const void* gmem, size_t bytes, Site site) {
  me()->site = site;
  if (reinterpret_cast<uintptr_t>(gmem) % bytes) {
    fail(site, "%s of %p: not %zu-byte aligned", name, gmem, bytes);
  }
  (void)*static_cast<const volatile uint32_t*>(gmem);
}

void assign(uint32_t* to, uint32_t value) {
  if (*to != value) note_event();
  *to = value;
}

}  // namespace

void settle(const void* address, size_t bytes) {
  Block* b = self->block;
  if (b->words.empty()) return;
  const auto* begin = static_cast<const unsigned char*>(address);
  for (size_t i = b->words.size(); i-- > 0;) {
    const Word& w = b->words[i];
    const auto* to = reinterpret_cast<const unsigned char*>(w.to);
    const bool ordered = w.owner == me() || w.handed_over;
    if (ordered && to < begin + bytes && begin < to + sizeof(uint32_t)) land(b, i);
  }
}

void hand_over() {
  for (Word& w : self->block->words) w.handed_over |= w.owner == me();
}

void land_words(Block* b, bool all) {
  uint32_t count = static_cast<uint32_t>(b->words.size());
  if (!all) count = rng.below(2) ? 1 : 1 + rng.below(count);
  for (; count > 0; --count) land(b, rng.below(static_cast<uint32_t>(b->words.size())));
}

void relaxed_store(const char* name, void* gmem, const uint32_t* words, int count, Site site) {
  FullThread* t = me();
  check(name, gmem, sizeof(uint32_t) * static_cast<size_t>(count), site);
  auto* to = static_cast<uint32_t*>(gmem);
  settle(to, sizeof(uint32_t) * static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) t->block->words.push_back({to + i, words[i], t, false});
  if (t->block->words.size() > kMaxWords) land_words(t->block, false);
  yield(site);
}

void release_store(const char* name, uint32_t* gmem, uint32_t value, Site site) {
  check(name, gmem, sizeof(uint32_t), site);
  release(me(), site);
  settle(gmem, sizeof(uint32_t));
  assign(gmem, value);
  pass_turn(site);
}

uint32_t release_add(const char* name, uint32_t* gmem, uint32_t value, Site site) {
  check(name, gmem, sizeof(uint32_t), site);
  release(me(), site);
  yield(site);
  settle(gmem, sizeof(uint32_t));
  const uint32_t old = *gmem;
  assign(gmem, old + value);
  pass_turn(site);
  return old;
}

void shared_load(const char* name, const void* gmem, uint32_t* words, int count, Site site) {
  const size_t bytes = sizeof(uint32_t) * static_cast<size_t>(count);
  check(name, gmem, bytes, site);
  poll(name, site, gmem);
  settle(gmem, bytes);
  // The words in one of the cyclic orders, now and then with a pause between two.
  const unsigned first = rng.below(static_cast<uint32_t>(count));
  for (int i = 0; i < count; ++i) {
    const unsigned at = (first + static_cast<unsigned>(i)) % static_cast<unsigned>(count);
    words[at] = static_cast<const volatile uint32_t*>(gmem)[at];
    if (i + 1 < count && rng.below(8) == 0) poll(name, site, gmem);
  }
}

void full_fence(Site site) {
  pass_turn(site);
  release(me(), site);
  pass_turn(site);
}

}  // namespace cumoe_host
