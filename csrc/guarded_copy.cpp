// A mapped page whose file has been cut off raises SIGBUS on the thread that reads it. The handler below jumps back into
// guarded_copy on exactly those threads and for exactly that memory; every other SIGBUS goes to whoever had the signal
// before. The handler is there only while copies run, so a handler installed in between (Python's faulthandler) keeps its place.
#include "guarded_copy.h"

#include <setjmp.h>
#include <signal.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>

namespace elo {
namespace {

struct Guard {
  sigjmp_buf back;
  uintptr_t begin = 0, end = 0;
  volatile sig_atomic_t armed = 0;
};
thread_local Guard guard;

std::mutex handler_mutex;
int copies_running = 0;
struct sigaction handler_before;

void on_bus_error(int number, siginfo_t* info, void* context) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
  if (guard.armed && at >= guard.begin && at < guard.end) {
    guard.armed = 0;
    siglongjmp(guard.back, 1);
  }
  if (handler_before.sa_flags & SA_SIGINFO) {
    handler_before.sa_sigaction(number, info, context);
  } else if (handler_before.sa_handler == SIG_DFL || handler_before.sa_handler == SIG_IGN) {
    signal(SIGBUS, SIG_DFL);  // the faulting instruction runs again and ends the process as it would have
  } else {
    handler_before.sa_handler(number);
  }
}

class HandlerInPlace {
 public:
  HandlerInPlace() {
    std::lock_guard<std::mutex> lock(handler_mutex);
    if (copies_running++ > 0) return;
    struct sigaction ours {};
    ours.sa_sigaction = on_bus_error;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, &handler_before);
  }
  ~HandlerInPlace() {
    std::lock_guard<std::mutex> lock(handler_mutex);
    if (--copies_running == 0) sigaction(SIGBUS, &handler_before, nullptr);
  }
};

}  // namespace

bool guarded_copy(void* to, const void* from, size_t count) {
  const HandlerInPlace handler;
  const uintptr_t page = 4096;
  guard.begin = reinterpret_cast<uintptr_t>(from) / page * page;
  guard.end = reinterpret_cast<uintptr_t>(from) + count;
  if (sigsetjmp(guard.back, 1)) return false;
  guard.armed = 1;
  std::atomic_signal_fence(std::memory_order_seq_cst);  // the copy stays between the two marks
  std::memcpy(to, from, count);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  guard.armed = 0;
  return true;
}

}  // namespace elo
