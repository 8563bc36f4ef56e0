// A block of rows through the frozen head: the whole vocabulary, tile by tile. Included by kernels_<isa>.cpp after isa_gemm.h.
//
// The logits of a tile are kept transposed, S[c][r]: then the rows of W are read where they lie in both products (broadcast
// in the first, as vectors in the second) and nothing as large as W is ever packed; the block's own rows are, once. The
// softmax runs down the columns, with a row of the block in each lane.

namespace ELO_ISA {

using elo::HEAD_COLS;
using elo::HEAD_ROWS;

// packed[j][d][c] = hidden[j * NR + c][d], zero beyond the rows.
static void pack_hidden(const float* hidden, int64_t rows, int64_t width, float* packed) {
  for (int64_t r = 0; r < HEAD_ROWS; ++r) {
    float* out = packed + r / NR * width * NR + r % NR;
    if (r < rows)
      for (int64_t d = 0; d < width; ++d) out[d * NR] = hidden[r * width + d];
    else
      for (int64_t d = 0; d < width; ++d) out[d * NR] = 0.0f;
  }
}

// scores[c][r] becomes exp(score - maximum so far); maxima, sums and the accumulator move to a maximum that grew.
static void softmax_columns(float* scores, int64_t rows, int64_t cols, int64_t width, float* running_max, float* running_sum,
                            float* acc) {
  for (int64_t r = 0; r < rows; r += W) {
    vf m0 = splat(-__builtin_inff()), m1 = m0;
    int64_t c = 0;
    for (; c + 2 <= cols; c += 2) {
      const vf x0 = load(scores + c * HEAD_ROWS + r), x1 = load(scores + (c + 1) * HEAD_ROWS + r);
      m0 = x0 > m0 ? x0 : m0;
      m1 = x1 > m1 ? x1 : m1;
    }
    if (c < cols) {
      const vf x = load(scores + c * HEAD_ROWS + r);
      m0 = x > m0 ? x : m0;
    }
    const vf old = load(running_max + r);
    vf top = m1 > m0 ? m1 : m0;
    top = top > old ? top : old;
    const vf shrink = exp_of(old - top);
    for (int i = 0; i < W; ++i)
      if (top[i] > old[i]) {
        running_sum[r + i] *= shrink[i];
        if (acc)
          for (int64_t d = 0; d < width; d += W) store(acc + (r + i) * width + d, load(acc + (r + i) * width + d) * shrink[i]);
      }
    store(running_max + r, top);
    // Nothing but -inf so far: any finite reference turns it into zeros, -inf itself into NaN.
    const vf reference = top == -__builtin_inff() ? vf{} : top;
    vf s0{}, s1{};
    for (c = 0; c + 2 <= cols; c += 2) {
      const vf e0 = exp_of(load(scores + c * HEAD_ROWS + r) - reference);
      const vf e1 = exp_of(load(scores + (c + 1) * HEAD_ROWS + r) - reference);
      store(scores + c * HEAD_ROWS + r, e0);
      store(scores + (c + 1) * HEAD_ROWS + r, e1);
      s0 += e0;
      s1 += e1;
    }
    if (c < cols) {
      const vf e = exp_of(load(scores + c * HEAD_ROWS + r) - reference);
      store(scores + c * HEAD_ROWS + r, e);
      s0 += e;
    }
    store(running_sum + r, load(running_sum + r) + (s0 + s1));
  }
}

static void head_block(const elo::FrozenHead& a, int64_t row_begin, int64_t rows, float* scratch) {
  const int64_t D = a.width, parts = (D + 319) / 320;  // a panel of 320 x 16 floats leaves room in a 32 KiB cache
  float* hidden = scratch;
  float* acc = hidden + HEAD_ROWS * D;
  float* scores = acc + HEAD_ROWS * D;
  float* tail = scores + HEAD_COLS * HEAD_ROWS;
  float* top = tail + HEAD_COLS * D;
  float* sum = top + HEAD_ROWS;
  pack_hidden(a.hidden + row_begin * D, rows, D, hidden);
  for (int64_t r = 0; r < HEAD_ROWS; ++r) {
    top[r] = -__builtin_inff();
    sum[r] = 0.0f;
  }
  clear(acc, a.acc ? HEAD_ROWS * D : 0);
  for (int64_t begin = 0; begin < a.vocabulary; begin += HEAD_COLS) {
    const int64_t cols = least(HEAD_COLS, a.vocabulary - begin);
    const float* weight = a.weight + begin * D;
    if (cols < HEAD_COLS) {  // register tiles read whole groups of rows
      for (int64_t i = 0; i < cols * D; i += W) store(tail + i, load(weight + i));
      clear(tail + cols * D, (HEAD_COLS - cols) * D);
      weight = tail;
    }
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = D * part / parts, depth = D * (part + 1) / parts - first;
      for (int64_t j = 0; j < rows; j += NR)
        for (int64_t i = 0; i < cols; i += MR) {
          const float* w = weight + i * D + first;
          const float* x = hidden + (j / NR * D + first) * NR;
          // W comes from memory here and only here: the next rows are asked for while these are multiplied
          // (82 -> 89 GFLOP/s of a core's 100, both products together).
          if (j == 0)
            for (int64_t m = MR; m < 2 * MR; ++m)
              for (int64_t d = 0; d < depth; d += 16) __builtin_prefetch(w + m * D + d);
          if (part == 0)
            multiply_tile<false>(depth, w, D, 1, x, NR, scores + i * HEAD_ROWS + j, HEAD_ROWS);
          else
            multiply_tile<true>(depth, w, D, 1, x, NR, scores + i * HEAD_ROWS + j, HEAD_ROWS);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t target = a.labels[row_begin + r] - begin;
      if (target >= 0 && target < cols) scores[target * HEAD_ROWS + r] = -__builtin_inff();  // exp gives exactly 0
    }
    softmax_columns(scores, rows, cols, D, top, sum, a.acc ? acc : nullptr);
    if (!a.acc) continue;
    const int64_t ahead = (cols * MR + rows - 1) / rows;  // rows of W's next panel to ask for at each register tile
    for (int64_t p = 0; p < D; p += NR)
      for (int64_t i = 0; i < rows; i += MR) {
        const int64_t c = i / MR * ahead;
        for (int64_t n = c; n < c + ahead && n < cols; ++n) __builtin_prefetch(weight + n * D + p + NR);
        multiply_tile<true>(cols, scores + i, 1, HEAD_ROWS, weight + p, D, acc + i * D + p, D);
      }
  }
  for (int64_t r = 0; r < rows; ++r) {
    a.running_max[row_begin + r] = top[r];
    a.running_sum[row_begin + r] = sum[r];
    if (a.acc)
      for (int64_t d = 0; d < D; d += W) store(a.acc + (row_begin + r) * D + d, load(acc + r * D + d));
  }
}

}  // namespace ELO_ISA
