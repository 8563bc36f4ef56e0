#include <omp.h>

#include <algorithm>

#include "drivers.h"
#include "scratch.h"

namespace elo {

void run_softmax_tile(const Kernels& kernels, const SoftmaxTile& a) {
  constexpr int64_t grain = 16;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < a.rows; r += grain) kernels.softmax_tile(a, r, std::min(r + grain, a.rows));
}

void run_frozen_head(const Kernels& kernels, const FrozenHead& a) {
  const int threads = omp_get_max_threads();
  // As few blocks as fit, but a whole number of rounds for the threads, and even ones.
  int64_t blocks = (a.rows + HEAD_ROWS - 1) / HEAD_ROWS;
  blocks = std::min((blocks + threads - 1) / threads * threads, a.rows);
  const int64_t scratch_size = head_scratch(a.width);
  const Floats scratch = allocate(threads * scratch_size);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = a.rows * b / blocks, last = a.rows * (b + 1) / blocks;
    kernels.head_block(a, first, last - first, scratch.get() + omp_get_thread_num() * scratch_size);
  }
}

}  // namespace elo
