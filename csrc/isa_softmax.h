// Online softmax over one tile of logits. Included by kernels_<isa>.cpp (see isa_vec.h).

namespace ELO_ISA {

static void softmax_tile(const elo::SoftmaxTile& a, int64_t row_begin, int64_t row_end) {
  const int64_t whole = a.cols / W * W;
  for (int64_t r = row_begin; r < row_end; ++r) {
    float* row = a.tile + r * a.tile_stride;
    const int64_t target = a.labels[r] - a.col_begin;
    if (target >= 0 && target < a.cols) row[target] = -__builtin_inff();  // exp gives exactly 0

    // Four maxima and sums side by side hide the latency of one chain.
    vf m0 = splat(-__builtin_inff()), m1 = m0, m2 = m0, m3 = m0;
    int64_t c = 0;
    for (; c + 4 * W <= whole; c += 4 * W) {
      vf x0 = load(row + c), x1 = load(row + c + W), x2 = load(row + c + 2 * W), x3 = load(row + c + 3 * W);
      m0 = x0 > m0 ? x0 : m0;
      m1 = x1 > m1 ? x1 : m1;
      m2 = x2 > m2 ? x2 : m2;
      m3 = x3 > m3 ? x3 : m3;
    }
    for (; c < whole; c += W) {
      vf x = load(row + c);
      m0 = x > m0 ? x : m0;
    }
    m0 = m1 > m0 ? m1 : m0;
    m2 = m3 > m2 ? m3 : m2;
    float top = max_of(m2 > m0 ? m2 : m0);
    for (; c < a.cols; ++c) top = row[c] > top ? row[c] : top;

    const float old = a.running_max[r];
    if (top > old) {
      const float shrink = exp_of(splat(old - top))[0];  // 0 while old is still -inf
      a.running_max[r] = top;
      a.running_sum[r] *= shrink;
      if (a.acc) {
        float* acc = a.acc + r * a.acc_stride;
        int64_t d = 0;
        for (; d + W <= a.acc_cols; d += W) store(acc + d, load(acc + d) * shrink);
        for (; d < a.acc_cols; ++d) acc[d] *= shrink;
      }
      } else {
      top = old;
    }
    // Nothing but -inf so far: any finite reference turns it into zeros, -inf itself into NaN.
    const float reference = top == -__builtin_inff() ? 0.0f : top;

    vf s0{}, s1{}, s2{}, s3{};
    for (c = 0; c + 4 * W <= whole; c += 4 * W) {
      vf e0 = exp_of(load(row + c) - reference);
      vf e1 = exp_of(load(row + c + W) - reference);
      vf e2 = exp_of(load(row + c + 2 * W) - reference);
      vf e3 = exp_of(load(row + c + 3 * W) - reference);
      store(row + c, e0);
      store(row + c + W, e1);
      store(row + c + 2 * W, e2);
      store(row + c + 3 * W, e3);
      s0 += e0;
      s1 += e1;
      s2 += e2;
      s3 += e3;
    }
    for (; c < whole; c += W) {
      vf e = exp_of(load(row + c) - reference);
      store(row + c, e);
      s0 += e;
    }
    float sum = sum_of((s0 + s1) + (s2 + s3));
    for (; c < a.cols; ++c) {
      row[c] = exp_of(splat(row[c] - reference))[0];
      sum += row[c];
    }
    a.running_sum[r] += sum;
  }
}

}  // namespace ELO_ISA
