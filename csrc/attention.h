// Splits attention over segments, heads and blocks, and the blocks over OpenMP threads.
#pragma once
#include <vector>

#include "kernels.h"

namespace elo {

// `starts`: the segments' first tokens and then the number of tokens, strictly growing from 0.
void run_attention_forward(const Kernels&, const AttentionForward&, const std::vector<int64_t>& starts);
void run_attention_backward(const Kernels&, const AttentionBackward&, const std::vector<int64_t>& starts);

}  // namespace elo
