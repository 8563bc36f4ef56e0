#include <algorithm>

#include "drivers.h"

namespace elo {

void run_adamw(const Kernels& kernels, const AdamwStep& a, const std::vector<AdamwTensor>& tensors) {
  // A task is 64 groups, about 100 KiB. Groups know nothing of each other, so any thread may take any task.
  constexpr int64_t grain = 64;
  std::vector<int64_t> firsts;  // each tensor's first task
  int64_t tasks = 0;
  for (const AdamwTensor& tensor : tensors) {
    firsts.push_back(tasks);
    tasks += (groups_of(tensor.count) + grain - 1) / grain;
  }
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task) {
    // The last that starts at or before the task: one of no elements shares its start with the next.
    const int64_t i = std::upper_bound(firsts.begin(), firsts.end(), task) - firsts.begin() - 1;
    const int64_t first = (task - firsts[i]) * grain;
    kernels.adamw_groups(a, tensors[i], first, std::min(first + grain, groups_of(tensors[i].count)));
  }
}

}  // namespace elo
