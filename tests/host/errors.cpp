// Errors of a run: the texts that name kernel, block, thread and source line, and where they come
// from: `fail`, signals, and the reports of UndefinedBehaviorSanitizer.
//
// The first error ends the run with its message; fibres are dropped where they are.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>

#include "internal.h"

namespace cumoe_host {

// ------------------------------------------------------------------------------------------- texts

namespace {

std::string format_text(const char* format, va_list args) {
  char text[2048];
  vsnprintf(text, sizeof text, format, args);
  return text;
}

const char* base_name(const char* path) {
  const char* slash = path ? strrchr(path, '/') : nullptr;
  return slash ? slash + 1 : path ? path : "?";
}

}  // namespace

std::string str(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string s = format_text(format, args);
  va_end(args);
  return s;
}

std::string at(Site s) { return s.line ? str("%s:%d", base_name(s.file), s.line) : "its start"; }

std::string grid_text(const Grid* grid, unsigned grid_idx) {
  const std::string kernel = str("kernel %s", grid->kernel->name);
  return run.num_grids > 1 ? kernel + str(", grid %u", grid_idx) : kernel;
}

std::string block_text(const Block* b) {
  return grid_text(b->grid, b->grid_idx) +
         str(", block (%u, %u, %u)", b->block_idx.x, b->block_idx.y, b->block_idx.z);
}

std::string thread_text(const FullThread* t) {
  return block_text(t->block) +
         str(", thread (%u, %u, %u)", t->thread_idx.x, t->thread_idx.y, t->thread_idx.z);
}

void record(const std::string& text) {
  if (!run.failed) run.error = text;
  run.failed = true;
}

/// The word at an address that may be one of a smaller type.
static unsigned word_at(const void* address) {
  unsigned word;
  memcpy(&word, reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) & ~uintptr_t{3}),
         sizeof word);
  return word;
}

std::string waiting_text(const Block* b) {
  struct Entry {
    std::string what, detail;  // the latter of the first thread
    unsigned first, last, count;
  };
  std::vector<Entry> entries;
  for (const FullThread& t : b->threads) {
    std::string what, detail;
    if (t.state == State::kExited) {
      what = "exited";
    } else if (t.state == State::kCollective) {
      what = str("in %s(mask 0x%08x) at ", t.doing, t.pending.mask) + at(t.site);
    } else if (t.state == State::kBarrier) {
      what = str("in %s at ", t.doing) + at(t.site);
      if (strcmp(t.doing, "mbarrier wait") == 0) what += mbarrier_text(&t);
    } else if (t.polling) {
      what = str("polling %s at ", t.doing) + at(t.site);
      if (t.polled) detail = str(" (%p, which holds 0x%x)", t.polled, word_at(t.polled));
    } else {
      what = "running after " + at(t.site);
    }
    bool found = false;
    for (Entry& e : entries) {
      if (e.what == what) e.last = t.linear, ++e.count, found = true;
    }
    if (!found) entries.push_back({what, detail, t.linear, t.linear, 1});
  }
  std::string text;
  for (const Entry& e : entries) {
    text +=
        str("\n  %u thread%s from %u to %u: ", e.count, e.count == 1 ? "" : "s", e.first, e.last);
    text += e.what + e.detail;
  }
  return text;
}

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

// ----------------------------------------------------------------------------------------- signals

namespace {

uint64_t watched_events = 0;
int watched_ticks = 0;

/// A fault of kernel code ends the run; the fibre is left where it is.
void on_signal(int number, siginfo_t* info, void*) {
  FullThread* t = me();
  if (number == SIGVTALRM) {
    if (t == nullptr || !on_fibre || run.failed) return;
    if (run.events != watched_events) {
      watched_events = run.events;
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

}  // namespace

SignalHandlers::SignalHandlers() : stack(64 << 10) {
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

SignalHandlers::~SignalHandlers() {
  setitimer(ITIMER_VIRTUAL, &old_timer, nullptr);
  int i = 0;
  for (int number : kSignals) sigaction(number, &old[i++], nullptr);
  sigaltstack(&old_stack, nullptr);
}

}  // namespace cumoe_host

using namespace cumoe_host;

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
