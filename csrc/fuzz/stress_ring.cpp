// Several callers share one ring under ThreadSanitizer: whoever holds a slot, and nobody else, reads and writes its memory.
// stress_ring SECONDS
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../mover.h"

namespace {

constexpr int64_t kSlot = 2 * elo::kPage, kFile = 64 * elo::kPage;

unsigned char at(int64_t offset) { return static_cast<unsigned char>(offset * 131 + offset / 251); }

void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 30;
  const int file = memfd_create("stress", 0), scratch = memfd_create("scratch", 0);
  std::vector<unsigned char> content(kFile);
  for (int64_t i = 0; i < kFile; ++i) content[static_cast<size_t>(i)] = at(i);
  require(pwrite(file, content.data(), content.size(), 0) == kFile, "the file");

  elo::Mover mover(4, kSlot, 3, std::make_unique<elo::SystemCalls>());
  std::atomic<bool> stop{false};
  std::atomic<int64_t> transfers{0}, refused{0}, full{0};
  const auto caller = [&](unsigned seed) {
    std::mt19937_64 random(seed);
    while (!stop) {
      const elo::Slot slot = mover.acquire();
      if (slot.index < 0) {
        ++full;
        continue;
      }
      char* memory = mover.memory() + slot.index * kSlot;
      for (int turn = static_cast<int>(random() % 3); turn >= 0; --turn) {
        const int64_t length = 1 + static_cast<int64_t>(random() % (kSlot - elo::kPage));
        const int64_t offset = static_cast<int64_t>(random() % static_cast<uint64_t>(kFile - length));
        const bool direct = random() % 2;
        const int64_t number = mover.fill(slot, file, file, offset, length, direct ? elo::Way::kDirect : elo::Way::kBuffered);
        elo::Transfer result;
        require(mover.wait(number, 60, &result) && !result.error && !result.ended, "a read");
        for (int64_t i = 0; i < length; i += 97)
          require(static_cast<unsigned char>(memory[result.skip + i]) == at(offset + i), "another holder's bytes");
        memory[0] = static_cast<char>(seed);  // the holder may write to its slot
        require(mover.wait(mover.store(slot, scratch, offset, length), 60, &result) && !result.error, "a write");
        ++transfers;
      }
      mover.release(slot);
      try {
        mover.release(slot);
        require(false, "a slot was given back twice");
      } catch (const std::invalid_argument&) {
        ++refused;
      }
    }
  };
  std::vector<std::thread> callers;
  for (unsigned seed = 0; seed < 6; ++seed) callers.emplace_back(caller, seed);  // more than there are slots
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  stop = true;
  for (std::thread& thread : callers) thread.join();
  require(transfers > 0 && refused > 0 && full > 0, "the stress reached every case");
  std::printf("stress_ring: %lld transfers, %lld stale releases refused, ring full %lld times in %.0f s\n",
              static_cast<long long>(transfers), static_cast<long long>(refused), static_cast<long long>(full), seconds);
}
