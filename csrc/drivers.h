// Splits the work over OpenMP threads; no result depends on how many there are.
#pragma once
#include <vector>

#include "kernels.h"

namespace elo {

void run_softmax_tile(const Kernels&, const SoftmaxTile&);
void run_frozen_head(const Kernels&, const FrozenHead&);

// `starts`: the segments' first tokens and then the number of tokens, strictly growing from 0.
void run_attention_forward(const Kernels&, const AttentionForward&, const std::vector<int64_t>& starts);
void run_attention_backward(const Kernels&, const AttentionBackward&, const std::vector<int64_t>& starts);

void run_adamw(const Kernels&, const AdamwStep&, const std::vector<AdamwTensor>& tensors);

}  // namespace elo
