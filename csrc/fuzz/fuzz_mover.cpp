// Drives the byte mover with arbitrary calls, faults and files that change size, under AddressSanitizer. What must hold: a call
// that makes no sense is refused, a transfer that reports success brought the file's bytes, and no byte outside is touched.
//
// With clang:  clang++ -fsanitize=fuzzer,address ...  (libFuzzer brings main)
// With g++:    -DOWN_MAIN, which feeds it random inputs for a given time: fuzz_mover SECONDS [SEED]
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../mover.h"

namespace {

constexpr int64_t kSlot = 2 * elo::kPage, kFile = 5 * elo::kPage + 123;

unsigned char at(int64_t offset) { return static_cast<unsigned char>(offset * 131 + offset / 251); }

// Reads numbers off the input; zero when it has ended.
struct Input {
  const uint8_t* data;
  size_t left;
  uint8_t byte() { return left ? (--left, *data++) : 0; }
  int64_t number() {  // small, near an edge, or wild
    switch (byte() % 6) {
      case 0: return byte();
      case 1: return elo::kPage * (byte() % 8);
      case 2: return elo::kPage * (byte() % 8) + byte() % 5 - 2;
      case 3: return kFile - byte() % 9;
      case 4: return kSlot - byte() % 3;
      default: {
        int64_t wild = 0;
        for (int i = 0; i < 8; ++i) wild = static_cast<int64_t>(static_cast<uint64_t>(wild) << 8 | byte());
        return wild;
      }
    }
  }
};

struct Job {
  int64_t number, offset, length;
  int64_t slot;  // -1: into the buffer
  bool writes;
};

void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in{data, size};
  static const int file = memfd_create("fuzz", 0), scratch = memfd_create("scratch", 0);
  std::vector<char> content(kFile);
  for (int64_t i = 0; i < kFile; ++i) content[static_cast<size_t>(i)] = static_cast<char>(at(i));
  require(ftruncate(file, 0) == 0 && pwrite(file, content.data(), content.size(), 0) == kFile, "the file");

  std::vector<elo::Fault> plan;
  for (int i = in.byte() % 4; i > 0; --i) {
    static const int errors[] = {0, 0, EINTR, EIO, EINVAL, ENOSPC};
    plan.push_back({in.byte() % 8 - 1, errors[in.byte() % 6], in.byte() % 2 ? elo::kPage : 1 + in.byte() % 200});
    if (plan.back().call == -1 && plan.back().error == EINTR) plan.back().error = 0;  // interrupted for ever is for ever
  }
  std::unique_ptr<elo::SystemCalls> calls;
  if (plan.empty()) {
    calls = std::make_unique<elo::SystemCalls>();
  } else {
    calls = std::make_unique<elo::FaultyCalls>(plan);
  }
  std::unique_ptr<elo::Mover> mover;
  try {
    const int64_t slots = in.byte() % 8 ? 2 : in.number(), bytes = in.byte() % 8 ? kSlot : in.number();
    if (slots > 64 || bytes > (1 << 20)) return 0;  // allowed, and slow
    mover = std::make_unique<elo::Mover>(slots, bytes, 1 + in.byte() % 3, std::move(calls));
  } catch (const std::invalid_argument&) {
    return 0;
  }

  // Each transfer straight into memory has a buffer of its own with guard bytes on both sides.
  std::vector<std::vector<char>> buffers;
  std::vector<elo::Slot> slots;
  std::vector<size_t> pending;  // buffers whose transfers nobody has waited for
  int64_t shortest = kFile;
  const auto finish = [&](const Job& job, const std::vector<char>* buffer) {
    elo::Transfer result;
    require(mover->wait(job.number, 60, &result), "a transfer that never ends");
    if (result.error || result.ended || job.writes || shortest < kFile) return;
    const char* found = buffer ? buffer->data() + 8 : mover->memory() + job.slot * mover->slot_bytes() + result.skip;
    for (int64_t i = 0; i < job.length; ++i)
      require(static_cast<unsigned char>(found[i]) == at(job.offset + i), "success with other bytes");
  };
  // After draining nothing may write any more: what is put into the memory then stays.
  const auto settle = [&] {
    mover->drain();
    for (const size_t i : pending) std::fill(buffers[i].begin(), buffers[i].end(), '\x33');
    std::this_thread::yield();
    for (const size_t i : pending)
      for (const char byte : buffers[i]) require(byte == '\x33', "written to after draining");
    for (const size_t i : pending) std::fill(buffers[i].begin(), buffers[i].end(), '\x5a');
    pending.clear();
  };
  while (in.left) {
    try {
      const uint8_t what = in.byte();
      switch (what % 8) {
        case 0: {
          const elo::Slot slot = mover->acquire();
          if (slot.index >= 0) slots.push_back(slot);
          break;
        }
        case 1: {
          if (slots.empty()) break;
          mover->release(slots[in.byte() % slots.size()]);  // stale ones are never taken off the list
          break;
        }
        case 2: {
          const elo::Slot wild{in.number(), static_cast<uint64_t>(in.number())};
          mover->release(wild);
          break;
        }
        case 3:
        case 4: {
          if (slots.empty()) break;
          const elo::Slot slot = slots[in.byte() % slots.size()];
          const int64_t offset = in.number(), length = in.number();
          const int fd = in.byte() % 16 ? file : in.byte() % 2 ? -1 : 9999;
          const auto way = static_cast<elo::Way>(in.byte() % 3);
          const int64_t number = mover->fill(slot, fd, in.byte() % 8 ? file : -1, offset, length, way);
          require(length <= mover->slot_bytes(), "more bytes than a slot has");
          finish({number, offset, length, slot.index, false}, nullptr);
          break;
        }
        case 5: {
          const int64_t offset = in.number(), length = in.number();
          if (length > (1 << 20)) break;  // the buffer is ours to make
          buffers.emplace_back(static_cast<size_t>(std::max<int64_t>(length, 0) + 16), '\x5a');
          const auto way = static_cast<elo::Way>(in.byte() % 3);
          const int64_t room = std::max<int64_t>(length, 0) - (in.byte() % 4 ? 0 : 1);  // one byte too few is refused
          const int64_t number = mover->into(buffers.back().data() + 8, room, file, in.byte() % 8 ? file : -1, offset, length, way);
          require(room >= length, "more bytes than there is room for");
          if (in.byte() % 2) {
            pending.push_back(buffers.size() - 1);
            break;
          }
          finish({number, offset, length, -1, false}, &buffers.back());
          for (size_t i = 0; i < 8; ++i)
            require(buffers.back()[i] == '\x5a' && buffers.back()[buffers.back().size() - 1 - i] == '\x5a', "a guard byte was written");
          break;
        }
        case 6: {
          if (slots.empty()) break;
          const elo::Slot slot = slots[in.byte() % slots.size()];
          const int64_t offset = in.number(), length = in.number();
          if (offset > (1 << 24)) break;  // a sparse file of exabytes is allowed, and not wanted here
          finish({mover->store(slot, scratch, offset, length), offset, length, slot.index, true}, nullptr);
          break;
        }
        default: {
          if (what < 128) {
            settle();
          } else {
            const int64_t cut = in.number();
            if (cut < 0 || cut > kFile) break;
            shortest = std::min(shortest, cut);
            require(ftruncate(file, cut) == 0, "truncating");
          }
        }
      }
    } catch (const std::invalid_argument&) {  // refused: nothing may have happened, which the next calls show
    }
  }
  settle();
  return 0;
}

#ifdef OWN_MAIN
int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 30;
  const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : std::random_device{}();
  std::mt19937_64 random(seed);
  const auto begin = std::chrono::steady_clock::now();
  int64_t inputs = 0;
  std::vector<uint8_t> data;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds) {
    data.resize(random() % 400);
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(data.data(), data.size());
    ++inputs;
  }
  std::printf("fuzz_mover: %lld inputs in %.0f s, seed %llu\n", static_cast<long long>(inputs), seconds,
              static_cast<unsigned long long>(seed));
}
#endif
