// Moves bytes between files and memory with a pool of threads: (fd, offset, length) -> slot of one fixed ring on huge pages,
// or straight into memory that was lent for it. Integers in, integers out: what the bytes mean, which file they belong to and
// whether the header told the truth is decided elsewhere (checkpoint/reader.py). The Python twin is checkpoint/mover.py.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "system_calls.h"

namespace elo {

constexpr int64_t kPage = 4096;  // O_DIRECT wants offset, address and length in whole blocks; a page serves every device

enum class Way : int { kBuffered = 0, kDirect = 1, kMapped = 2 };

struct Slot {
  int64_t index;
  uint64_t generation;
};

struct Transfer {
  int error = 0;           // errno, or 0
  bool ended = false;      // the file ended before the last byte
  int64_t at = 0;          // file offset of the failure
  int64_t skip = 0;        // where in the slot the first wanted byte lies
  int64_t transferred = 0; // bytes taken from or given to the file, the rest of a direct read's blocks included
  Way way = Way::kBuffered;  // what was really done: a direct read falls back where the filesystem has none
};

class Mover {
 public:
  // Throws std::invalid_argument for sizes that make no ring, std::bad_alloc where the memory is not there.
  Mover(int64_t slots, int64_t slot_bytes, int threads, std::unique_ptr<SystemCalls> calls);
  ~Mover();
  // False in a process forked off the one that made it: its threads did not come along, and it must be left alone.
  bool owned() const { return owner_ == getpid(); }
  Mover(const Mover&) = delete;
  Mover& operator=(const Mover&) = delete;

  // A free slot, or index -1. The generation changes with every acquire, so whoever comes late with an old one is refused.
  Slot acquire();
  void release(Slot slot);

  // Each starts one transfer and returns its number. direct_fd: the same file opened with O_DIRECT, for Way::kDirect.
  // Directly into memory goes by way of a slot of the thread's own: the pages around the range have no place there.
  int64_t fill(Slot slot, int fd, int direct_fd, int64_t offset, int64_t length, Way way);
  int64_t into(char* to, int64_t capacity, int fd, int direct_fd, int64_t offset, int64_t length, Way way);
  int64_t store(Slot slot, int fd, int64_t offset, int64_t length);

  // True when the transfer has ended within the time; its result is then given out once.
  bool wait(int64_t number, double seconds, Transfer* result);
  // No transfer runs any more and none starts: those that waited are dropped. Results not asked for are forgotten.
  void drain();

  char* memory() const { return memory_; }
  int64_t slots() const { return static_cast<int64_t>(states_.size()); }
  int64_t slot_bytes() const { return slot_bytes_; }

 private:
  enum class State { kFree, kHeld, kBusy };
  struct SlotState {
    State state = State::kFree;
    uint64_t generation = 0;
  };
  struct Job {
    int64_t number;
    int64_t slot;  // -1: straight into memory
    char* to;
    int64_t capacity;
    int fd, direct_fd;
    int64_t offset, length;
    Way way;
    bool writes;
  };

  void check(Slot slot, State state) const;
  int64_t start(Job job);
  void work(char* own_slot);
  Transfer run(const Job& job, char* own_slot);
  Transfer read_buffered(const Job& job, int64_t done);
  Transfer read_direct(const Job& job);
  Transfer read_mapped(const Job& job);
  Transfer write(const Job& job);

  void stop();

  const pid_t owner_ = getpid();
  const int64_t slot_bytes_;
  std::unique_ptr<SystemCalls> calls_;
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  char* memory_ = nullptr;

  mutable std::mutex mutex_;
  std::condition_variable work_there_, work_done_;
  std::vector<SlotState> states_;
  std::deque<Job> waiting_;
  std::unordered_map<int64_t, Transfer> ended_;
  std::unordered_map<int64_t, bool> known_;  // started and not given out yet
  int64_t next_number_ = 0, running_ = 0;
  uint64_t next_generation_ = 1;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace elo
