// The system calls that move checkpoint bytes, as a table: tests put a short read, EINTR, EIO or ENOSPC at an exact call.
#pragma once

#include <signal.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace elo {

class SystemCalls {
 public:
  virtual ~SystemCalls() = default;
  virtual ssize_t pread(int fd, void* to, size_t count, int64_t offset) { return ::pread(fd, to, count, offset); }
  virtual ssize_t pwrite(int fd, const void* from, size_t count, int64_t offset) { return ::pwrite(fd, from, count, offset); }
  virtual int fstat(int fd, struct stat* status) { return ::fstat(fd, status); }
};

// The `call`-th transfer (from 0, reads and writes counted together) fails with `error`, or, where that is 0, moves at most
// `limit` bytes; a limit of 0 is an end of file. `call` -1 is every call. An `error` below 0 is a signal to the process itself.
struct Fault {
  int64_t call;
  int error;
  int64_t limit;
};

class FaultyCalls final : public SystemCalls {
 public:
  explicit FaultyCalls(std::vector<Fault> plan) : plan_(std::move(plan)) {}

  ssize_t pread(int fd, void* to, size_t count, int64_t offset) override {
    return faulted(count) ? -1 : count == 0 ? 0 : ::pread(fd, to, count, offset);
  }
  ssize_t pwrite(int fd, const void* from, size_t count, int64_t offset) override {
    return faulted(count) ? -1 : count == 0 ? 0 : ::pwrite(fd, from, count, offset);
  }

 private:
  bool faulted(size_t& count) {
    int64_t call;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      call = calls_++;
    }
    for (const Fault& fault : plan_) {
      if (fault.call != call && fault.call != -1) continue;
      if (fault.error < 0) ::kill(::getpid(), -fault.error);
      if (fault.error > 0) {
        errno = fault.error;
        return true;
      }
      if (static_cast<uint64_t>(fault.limit) < count) count = static_cast<size_t>(fault.limit);
    }
    return false;
  }

  std::vector<Fault> plan_;
  std::mutex mutex_;
  int64_t calls_ = 0;
};

}  // namespace elo
