#include <omp.h>

#include <algorithm>
#include <cmath>

#include "drivers.h"
#include "scratch.h"

namespace elo {
namespace {

// Where packed blocks lie: head by head, and in a head segment by segment.
struct Blocks {
  std::vector<int64_t> begin;  // of each segment, within a head
  int64_t total = 0;           // in a head

  explicit Blocks(const std::vector<int64_t>& starts) {
    for (size_t s = 0; s + 1 < starts.size(); ++s) {
      begin.push_back(total);
      total += (starts[s + 1] - starts[s] + BLOCK - 1) / BLOCK;
    }
  }
  int64_t at(const AttentionTask& t, int64_t head) const { return head * total + begin[t.segment]; }
};

// Every block of every head, of every segment.
std::vector<AttentionTask> block_tasks(const std::vector<int64_t>& starts, int64_t heads) {
  std::vector<AttentionTask> tasks;
  for (size_t s = 0; s + 1 < starts.size(); ++s) {
    const int64_t length = starts[s + 1] - starts[s];
    for (int64_t first = 0; first < length; first += BLOCK)
      for (int64_t h = 0; h < heads; ++h)
        tasks.push_back({static_cast<int64_t>(s), starts[s], length, h, first, std::min(first + BLOCK, length)});
  }
  return tasks;
}

// How many chunks a segment's keys are cut into for each kv head: enough tasks for some threads, while the number depends
// on the shapes alone, so that the order of d_q's sum, and with it every bit, is the same for any number of threads. Each
// chunk costs one more copy of d_q, hence the 4.
int64_t chunks(int64_t segments, int64_t kv_heads) {
  const int64_t units = segments * kv_heads;
  return std::clamp<int64_t>((24 + units - 1) / units, 1, 4);
}

// Cuts [0, length) into chunks of about equal work, on the grid of blocks. A key is seen by `window` queries or by those up
// to the segment's end: work is flat over the first length - window keys, then a triangle, which here has area 1.
std::vector<int64_t> cut_keys(int64_t length, int64_t window, int64_t wanted) {
  const double side = static_cast<double>(std::min(window, length)), flat = static_cast<double>(length) - side;
  const double flat_work = 2.0 * flat / side;
  std::vector<int64_t> cuts = {0};
  for (int64_t c = 1; c < wanted; ++c) {
    const double work = static_cast<double>(c) / static_cast<double>(wanted) * (1.0 + flat_work), beyond = work - flat_work;
    const double at = beyond < 0.0 ? work * side / 2.0 : flat + side * (1.0 - std::sqrt(1.0 - beyond));
    const int64_t key = static_cast<int64_t>(at / BLOCK + 0.5) * BLOCK;
    if (key > cuts.back() && key < length) cuts.push_back(key);
  }
  cuts.push_back(length);
  return cuts;
}

// How many queries from key `first` on have a block that sees a key of [first, last).
int64_t seeing_queries(int64_t first, int64_t last, int64_t length, int64_t window) {
  return std::min(length, (last + window - 1 + BLOCK - 1) / BLOCK * BLOCK) - first;
}

}  // namespace

void run_attention_forward(const Kernels& kernels, const AttentionForward& a, const std::vector<int64_t>& starts) {
  const Blocks blocks(starts);
  const std::vector<AttentionTask> packs = block_tasks(starts, a.kv_heads);
  std::vector<AttentionTask> tasks = block_tasks(starts, a.heads);
  // The longest first, so that the last task to finish is a short one.
  std::stable_sort(tasks.begin(), tasks.end(), [](const auto& x, const auto& y) { return x.first > y.first; });

  const int64_t wide = kernels.padded_width(a.width), group = a.heads / a.kv_heads;
  const int64_t key_block = BLOCK * a.width, value_block = BLOCK * wide, scratch_size = attention_scratch(wide);
  const int threads = omp_get_max_threads();
  const Floats keys = allocate(a.kv_heads * blocks.total * key_block);
  const Floats values = allocate(a.kv_heads * blocks.total * value_block);
  const Floats scratch = allocate(threads * scratch_size);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (size_t i = 0; i < packs.size(); ++i) {
      const int64_t at = blocks.at(packs[i], packs[i].head) + packs[i].first / BLOCK;
      kernels.attention_pack(a, packs[i], keys.get() + at * key_block, values.get() + at * value_block);
    }
    float* mine = scratch.get() + omp_get_thread_num() * scratch_size;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); ++i) {
      const int64_t at = blocks.at(tasks[i], tasks[i].head / group);
      kernels.attention_forward(a, tasks[i], keys.get() + at * key_block, values.get() + at * value_block, mine);
    }
  }
}

void run_attention_backward(const Kernels& kernels, const AttentionBackward& a, const std::vector<int64_t>& starts) {
  const int64_t segments = static_cast<int64_t>(starts.size()) - 1, wide = kernels.padded_width(a.width);
  const int64_t group = a.heads / a.kv_heads, wanted = chunks(segments, a.kv_heads);
  const Blocks blocks(starts);
  const std::vector<AttentionTask> packs = block_tasks(starts, a.heads);

  struct Chunk {
    AttentionTask task;
    int64_t d_q;         // where its share of d_q starts
    int64_t d_q_stride;  // from one query head's share to the next one's
  };
  std::vector<Chunk> tasks;
  std::vector<std::vector<int64_t>> cuts, shares(static_cast<size_t>(segments));  // shares: [segment][chunk * kv_heads + head]
  int64_t floats = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t length = starts[s + 1] - starts[s];
    cuts.push_back(cut_keys(length, a.window, wanted));
    for (size_t c = 0; c + 1 < cuts[s].size(); ++c)
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        const int64_t first = cuts[s][c], last = cuts[s][c + 1];
        const int64_t share = padded_rows(seeing_queries(first, last, length, a.window)) * wide;
        tasks.push_back({{s, starts[s], length, h, first, last}, floats, share});
        shares[s].push_back(floats);
        floats += group * share;
      }
  }
  const auto work = [&](const AttentionTask& t) {
    return (t.last - t.first) * std::min(2 * a.window, 2 * t.length - t.first - t.last);
  };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const auto& x, const auto& y) { return work(x.task) > work(y.task); });

  const int64_t block = BLOCK * wide, head_stride = blocks.total * block, scratch_size = attention_scratch(wide);
  const int threads = omp_get_max_threads();
  const Floats d_q = allocate(floats);
  const Floats queries = allocate(a.heads * head_stride), d_outs = allocate(a.heads * head_stride);
  const Floats scratch = allocate(threads * scratch_size);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (size_t i = 0; i < packs.size(); ++i) {
      const int64_t at = (blocks.at(packs[i], packs[i].head) + packs[i].first / BLOCK) * block;
      kernels.attention_pack_queries(a, packs[i], queries.get() + at, d_outs.get() + at);
    }
    float* mine = scratch.get() + omp_get_thread_num() * scratch_size;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); ++i) {
      const AttentionTask& t = tasks[i].task;
      const int64_t at = blocks.at(t, t.head * group) * block;
      kernels.attention_backward(a, t, queries.get() + at, d_outs.get() + at, head_stride, d_q.get() + tasks[i].d_q,
                                 tasks[i].d_q_stride, mine);
    }
    // d_q = scale * the chunks' shares, in their order.
#pragma omp for schedule(static)
    for (size_t i = 0; i < packs.size(); ++i) {
      const AttentionTask& t = packs[i];
      const std::vector<int64_t>& cut = cuts[t.segment];
      for (int64_t n = t.first; n < t.last; ++n) {
        float* out = a.d_q + ((t.begin + n) * a.heads + t.head) * a.width;
        bool begun = false;
        for (size_t c = 0; c + 1 < cut.size() && cut[c] <= n; ++c) {
          const int64_t rows = seeing_queries(cut[c], cut[c + 1], t.length, a.window);
          if (n - cut[c] >= rows) continue;
          const float* share = d_q.get() + shares[t.segment][c * a.kv_heads + t.head / group] +
                               (t.head % group * padded_rows(rows) + n - cut[c]) * wide;
          for (int64_t e = 0; e < a.width; ++e) out[e] = (begun ? out[e] : 0.0f) + a.scale * share[e];
          begun = true;
        }
      }
    }
  }
}

}  // namespace elo
