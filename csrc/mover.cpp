#include "mover.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

#include "guarded_copy.h"

namespace elo {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kMost = int64_t{1} << 40;  // more is a mistake, and less cannot overflow

Transfer failed(int error, int64_t at, int64_t transferred, Way way) {
  Transfer result;
  result.error = error;
  result.at = at;
  result.transferred = transferred;
  result.way = way;
  return result;
}

Transfer ended(int64_t at, int64_t transferred, Way way) {
  Transfer result = failed(0, at, transferred, way);
  result.ended = true;
  return result;
}

Transfer whole(int64_t transferred, Way way) { return failed(0, 0, transferred, way); }

}  // namespace

Mover::Mover(int64_t slots, int64_t slot_bytes, int threads, std::unique_ptr<SystemCalls> calls)
    : slot_bytes_(slot_bytes), calls_(std::move(calls)) {
  if (slots < 1 || slots > 4096 || threads < 1 || threads > 256 || slot_bytes < 2 * kPage || slot_bytes % kPage ||
      slot_bytes > kMost / (slots + threads))
    throw std::invalid_argument("mover: 1 to 4096 slots of whole pages, two or more, and 1 to 256 threads");
  // Aligned to a huge page. A slot's pages come with its first use, on the thread that fills it: zeroing them all here would
  // make the first read wait.
  const int64_t bytes = (slots + threads) * slot_bytes;  // the ring, and a slot for each thread
  mapping_bytes_ = static_cast<size_t>(bytes + kHugePage);
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  const auto begin = reinterpret_cast<uintptr_t>(mapping_);
  memory_ = reinterpret_cast<char*>((begin + kHugePage - 1) / kHugePage * kHugePage);
  madvise(memory_, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // where there are none, small pages serve
  states_.resize(static_cast<size_t>(slots));
  try {
    for (int i = 0; i < threads; ++i)
      threads_.emplace_back([this, own = memory_ + (slots + i) * slot_bytes] { work(own); });
  } catch (...) {  // not as many threads as asked for
    stop();
    throw;
  }
}

Mover::~Mover() {
  drain();
  stop();
}

void Mover::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  work_there_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  munmap(mapping_, mapping_bytes_);
}

Slot Mover::acquire() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < states_.size(); ++i) {
    if (states_[i].state != State::kFree) continue;
    states_[i] = {State::kHeld, next_generation_++};
    return {static_cast<int64_t>(i), states_[i].generation};
  }
  return {-1, 0};
}

void Mover::check(Slot slot, State state) const {
  if (slot.index < 0 || slot.index >= slots()) throw std::invalid_argument("mover: there is no such slot");
  const SlotState& found = states_[static_cast<size_t>(slot.index)];
  if (found.state == State::kFree || found.generation != slot.generation)
    throw std::invalid_argument("mover: stale: the slot has been released since, and may hold other bytes");
  if (found.state != state) throw std::invalid_argument("mover: the slot's transfer has not ended");
}

void Mover::release(Slot slot) {
  std::lock_guard<std::mutex> lock(mutex_);
  check(slot, State::kHeld);
  states_[static_cast<size_t>(slot.index)].state = State::kFree;
}

int64_t Mover::start(Job job) {
  if (job.fd < 0 || job.offset < 0 || job.length < 1 || job.length > kMost ||
      job.offset > std::numeric_limits<int64_t>::max() - kMost - kPage)
    throw std::invalid_argument("mover: a descriptor, an offset or a length is out of range");
  const int64_t head = job.way == Way::kDirect ? job.offset % kPage : 0;
  const int64_t span = job.way == Way::kDirect ? (head + job.length + kPage - 1) / kPage * kPage : job.length;
  if (span > (job.slot < 0 && job.way == Way::kDirect ? slot_bytes_ : job.capacity) || job.length > job.capacity)
    throw std::invalid_argument("mover: the bytes do not fit their slot");
  if (job.way == Way::kDirect && job.direct_fd < 0) throw std::invalid_argument("mover: a direct read needs its descriptor");
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job.number = next_number_++;
    known_.emplace(job.number, true);
    waiting_.push_back(job);
  }
  work_there_.notify_one();
  return job.number;
}

int64_t Mover::fill(Slot slot, int fd, int direct_fd, int64_t offset, int64_t length, Way way) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    check(slot, State::kHeld);
    states_[static_cast<size_t>(slot.index)].state = State::kBusy;
  }
  try {
    return start({0, slot.index, memory_ + slot.index * slot_bytes_, slot_bytes_, fd, direct_fd, offset, length, way, false});
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    states_[static_cast<size_t>(slot.index)].state = State::kHeld;
    throw;
  }
}

int64_t Mover::into(char* to, int64_t capacity, int fd, int direct_fd, int64_t offset, int64_t length, Way way) {
  if (to == nullptr || capacity < 0) throw std::invalid_argument("mover: the memory to read into is missing");
  return start({0, -1, to, capacity, fd, direct_fd, offset, length, way, false});
}

int64_t Mover::store(Slot slot, int fd, int64_t offset, int64_t length) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    check(slot, State::kHeld);
    states_[static_cast<size_t>(slot.index)].state = State::kBusy;
  }
  try {
    return start({0, slot.index, memory_ + slot.index * slot_bytes_, slot_bytes_, fd, -1, offset, length, Way::kBuffered, true});
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    states_[static_cast<size_t>(slot.index)].state = State::kHeld;
    throw;
  }
}

bool Mover::wait(int64_t number, double seconds, Transfer* result) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!known_.count(number)) throw std::invalid_argument("mover: no such transfer, or its result was given out");
  const auto there = [&] { return ended_.count(number) > 0; };
  if (!work_done_.wait_for(lock, std::chrono::duration<double>(seconds), there)) return false;
  *result = ended_.at(number);
  ended_.erase(number);
  known_.erase(number);
  return true;
}

void Mover::drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (const Job& job : waiting_)
    if (job.slot >= 0) states_[static_cast<size_t>(job.slot)].state = State::kHeld;
  waiting_.clear();
  work_done_.wait(lock, [&] { return running_ == 0; });
  ended_.clear();
  known_.clear();
}

void Mover::work(char* own_slot) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    work_there_.wait(lock, [&] { return stop_ || !waiting_.empty(); });
    if (stop_) return;
    const Job job = waiting_.front();
    waiting_.pop_front();
    ++running_;
    lock.unlock();
    const Transfer result = run(job, own_slot);
    lock.lock();
    --running_;
    if (job.slot >= 0) states_[static_cast<size_t>(job.slot)].state = State::kHeld;
    ended_.emplace(job.number, result);
    work_done_.notify_all();
  }
}

Transfer Mover::run(const Job& job, char* own_slot) {
  if (job.writes) return write(job);
  struct stat status {};
  if (calls_->fstat(job.fd, &status) != 0) return failed(errno, job.offset, 0, job.way);
  if (job.offset + job.length > status.st_size) return ended(status.st_size, 0, job.way);
  if (job.way == Way::kDirect && job.slot < 0) {
    Job through = job;
    through.to = own_slot;
    Transfer result = read_direct(through);
    if (!result.error && !result.ended) std::memcpy(job.to, own_slot + result.skip, static_cast<size_t>(job.length));
    result.skip = 0;
    return result;
  }
  if (job.way == Way::kDirect) return read_direct(job);
  return job.way == Way::kMapped ? read_mapped(job) : read_buffered(job, 0);
}

Transfer Mover::read_buffered(const Job& job, int64_t done) {
  while (done < job.length) {
    const ssize_t count = calls_->pread(job.fd, job.to + done, static_cast<size_t>(job.length - done), job.offset + done);
    if (count > 0) {
      done += count;
    } else if (count == 0) {
      return ended(job.offset + done, done, Way::kBuffered);
    } else if (errno != EINTR) {
      return failed(errno, job.offset + done, done, Way::kBuffered);
    }
  }
  return whole(done, Way::kBuffered);
}

// Whole blocks around the wanted bytes. A short read ends in the middle of a block only at the end of the file; otherwise it
// goes on from the last whole block.
Transfer Mover::read_direct(const Job& job) {
  const int64_t skip = job.offset % kPage, begin = job.offset - skip;
  const int64_t wanted = skip + job.length, span = (wanted + kPage - 1) / kPage * kPage;
  int64_t done = 0, transferred = 0;
  while (done < wanted) {
    const ssize_t count = calls_->pread(job.direct_fd, job.to + done, static_cast<size_t>(span - done), begin + done);
    if (count > 0) {
      transferred += count;
      if (done + count >= wanted) break;
      if (count < kPage) {  // no block got done: the end of the file, or a filesystem of smaller ones
        Transfer result = read_buffered(job, 0);
        result.transferred += transferred;
        return result;
      }
      done = (done + count) / kPage * kPage;
    } else if (count == 0) {
      return ended(begin + done, transferred, Way::kDirect);
    } else if (errno == EINVAL || errno == EOPNOTSUPP || errno == ENOSYS) {
      Transfer result = read_buffered(job, 0);  // a filesystem that opens files directly and does not read them so
      result.transferred += transferred;
      return result;
    } else if (errno != EINTR) {
      return failed(errno, begin + done, transferred, Way::kDirect);
    }
  }
  Transfer result = whole(transferred, Way::kDirect);
  result.skip = skip;
  return result;
}

Transfer Mover::read_mapped(const Job& job) {
  static const int64_t page = sysconf(_SC_PAGESIZE);  // 64 KiB on some
  const int64_t skip = job.offset % page;
  const size_t bytes = static_cast<size_t>(skip + job.length);
  // Populated in one go: page faults one by one would cost as much as the copy.
  void* map = mmap(nullptr, bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, job.fd, job.offset - skip);
  if (map == MAP_FAILED) return failed(errno, job.offset, 0, Way::kMapped);
  const bool good = guarded_copy(job.to, static_cast<const char*>(map) + skip, static_cast<size_t>(job.length));
  munmap(map, bytes);
  if (good) return whole(job.length, Way::kMapped);
  struct stat status {};
  // A page that is inside the file and cannot be read is the disk's failure, not the file's end.
  const bool inside = calls_->fstat(job.fd, &status) != 0 || job.offset + job.length <= status.st_size;
  return inside ? failed(EIO, job.offset, 0, Way::kMapped) : ended(status.st_size, 0, Way::kMapped);
}

Transfer Mover::write(const Job& job) {
  int64_t done = 0;
  while (done < job.length) {
    const ssize_t count = calls_->pwrite(job.fd, job.to + done, static_cast<size_t>(job.length - done), job.offset + done);
    if (count > 0) {
      done += count;
    } else if (count == 0) {
      return failed(EIO, job.offset + done, done, Way::kBuffered);  // a device that takes nothing and says nothing
    } else if (errno != EINTR) {
      return failed(errno, job.offset + done, done, Way::kBuffered);
    }
  }
  return whole(done, Way::kBuffered);
}

}  // namespace elo
