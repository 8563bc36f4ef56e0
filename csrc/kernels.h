// The table of kernels that each instruction set fills in, and what they are given.
#pragma once
#include <cstdint>

namespace elo {

struct SoftmaxTile {  // rows x cols logits, one vocabulary tile of the whole
  float* tile;
  int64_t rows, cols, tile_stride;
  const int64_t* labels;  // column of the row's target in the whole vocabulary; left out of the sums
  int64_t col_begin;      // column of the whole vocabulary where this tile starts
  float* running_max;
  float* running_sum;
  float* acc;  // rows x acc_cols, rescaled when a row's maximum grows; null: nothing to rescale
  int64_t acc_cols, acc_stride;
};

// Queries and keys in a square of attention scores: a multiple of every register tile (6, 12, 8, 16 and 32).
constexpr int64_t BLOCK = 96;

// d_q's partial sums end on a whole register tile.
inline int64_t padded_rows(int64_t rows) { return (rows + 11) / 12 * 12; }

struct AttentionForward {
  const float *q, *k, *v;  // [tokens, heads | kv_heads, width]; the two inner dimensions are contiguous
  int64_t q_stride, k_stride, v_stride;
  int64_t tokens, heads, kv_heads, width;
  float scale;
  int64_t window;  // a query sees this many tokens, itself included; at most `tokens`
  float softcap;   // scores become softcap * tanh(score / softcap); 0: they stay
  float* out;      // [tokens, heads, width]
  // [heads, tokens] log-sum-exp. Under a softcap [2, heads, tokens]: the largest score, and the log of the sum of
  // exp(score - largest). Added up they would round to the score's last place, and many keys may share a score near the cap.
  float* lse;
};

struct AttentionBackward {
  const float *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
  int64_t tokens, heads, kv_heads, width;
  float scale;
  int64_t window;
  float softcap;
  const float *out, *d_out, *lse;
  float *d_q, *d_k, *d_v;  // contiguous, shaped like q, k, v
  float* delta;            // [heads, tokens], scratch
};

struct AttentionTask {
  int64_t segment, begin, length;  // which segment, its first token, its tokens
  int64_t head;                    // query head; kv head where keys are packed and in the backward pass
  int64_t first, last;             // queries or keys, counted from the segment's start
};

// Rows and vocabulary columns of a tile of the frozen head: multiples of every register tile.
constexpr int64_t HEAD_ROWS = 96, HEAD_COLS = 96;

struct FrozenHead {
  const float* hidden;  // [rows, width], contiguous
  const float* weight;  // [vocabulary, width], contiguous; width a multiple of 32
  const int64_t* labels;
  int64_t rows, width, vocabulary;
  float* running_max;  // [rows], written
  float* running_sum;  // [rows], written
  float* acc;          // [rows, width], written; null: not wanted
};

inline int64_t head_scratch(int64_t width) {
  return (2 * HEAD_ROWS + HEAD_COLS) * width + HEAD_COLS * HEAD_ROWS + 2 * HEAD_ROWS;
}

constexpr int64_t GROUP = 256;  // elements whose 8-bit moments share a scale

inline int64_t groups_of(int64_t count) { return count / GROUP + (count % GROUP != 0); }

struct AdamwStep {  // the numbers of reference_adamw.control, and what the tensors hold: fp32, or bf16
  float factor, step, root, rate1, rate2, eps, decay;
  bool grad_bf16, weight_bf16;
};

struct AdamwTensor {
  const void* grad;
  void* weight;
  int8_t* m_codes;
  uint8_t* v_codes;
  float *m_scales, *v_scales;  // [groups_of(count)]
  int64_t count;
  uint32_t base, key;  // of the random bits
};

struct Kernels {
  const char* name;
  // Turns the rows [row_begin, row_end) of a tile into exp(logit - running max).
  void (*softmax_tile)(const SoftmaxTile&, int64_t row_begin, int64_t row_end);
  int64_t (*padded_width)(int64_t width);
  void (*attention_pack)(const AttentionForward&, const AttentionTask&, float* keys, float* values);
  void (*attention_forward)(const AttentionForward&, const AttentionTask&, const float* keys, const float* values,
                            float* scratch);
  void (*attention_pack_queries)(const AttentionBackward&, const AttentionTask&, float* queries, float* d_outs);
  void (*attention_backward)(const AttentionBackward&, const AttentionTask&, const float* queries, const float* d_outs,
                             int64_t head_stride, float* d_q, int64_t d_q_stride, float* scratch);
  void (*head_block)(const FrozenHead&, int64_t row_begin, int64_t rows, float* scratch);
  void (*adamw_groups)(const AdamwStep&, const AdamwTensor&, int64_t begin, int64_t end);
};

// Floats of scratch that a task of either pass needs.
inline int64_t attention_scratch(int64_t padded_width) { return 5 * BLOCK * padded_width + 2 * BLOCK * BLOCK + 2 * BLOCK; }

extern const Kernels base_kernels, avx2_kernels, avx512_kernels;  // the last two only on x86-64

// The widest set this processor has, or the one named; null where it cannot run here.
const Kernels* find_kernels(const char* name);

}  // namespace elo
