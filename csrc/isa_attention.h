// Causal attention of one head on one block of queries (forward) or keys (backward).
// Included by kernels_<isa>.cpp after isa_gemm.h (see isa_vec.h).
//
// Flash attention (Dao et al., arXiv 2205.14135): scores live only as one BLOCK x BLOCK square, the forward pass keeps the
// output and the log-sum-exp, the backward pass makes the probabilities again. Causality and the window are used at the grain
// of a register tile: a tile wholly in the future or before the window is skipped, and sums over keys or queries run exactly
// over the part that counts. At both edges of a row's span the rest of the register tile is made exactly 0.
// Operands that a register tile reads by columns are packed into panels of NR columns, zero-padded, so that no tile needs
// an edge case; only what is copied out is cut to size.

namespace ELO_ISA {

using elo::BLOCK;

ELO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ELO_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The first key of a block that the block's query `row` sees through the window; BLOCK or more: it sees none.
// Here and below `ahead` is the first query's position minus the first key's.
ELO_INLINE int64_t first_seen(int64_t row, int64_t ahead, int64_t window) { return most(0, row + ahead + 1 - window); }

// tanh, good to a few ulp at any size: the odd polynomial of Cephes' tanhf below 0.625, 1 - 2u / (1 + u) with
// u = exp(-2 |x|) above, which saturates at 1. A NaN stays a NaN. The derivative 1 - tanh^2 is exact to a few ulp as well,
// where the square of a tanh near 1 would leave little of it.
ELO_INLINE vf tanh_of(vf x, vf& derivative) {
  const vi sign_bit = (vi)splat(-0.0f);
  const vf size = (vf)((vi)x & ~sign_bit), z = x * x, u = exp_of(-2.0f * size);
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vf near = p * z * x + x, rest = (u + u) / (1.0f + u);
  derivative = size < 0.625f ? 1.0f - near * near : rest * (2.0f - rest);
  return size < 0.625f ? near : (vf)((vi)(1.0f - rest) | ((vi)x & sign_bit));
}

static int64_t padded_width(int64_t width) { return (width + NR - 1) / NR * NR; }

// panels[j][e][c] = rows[j * NR + c][e]: the transpose, for a product that sums over the width.
static void pack_columns(const float* rows, int64_t stride, int64_t count, int64_t width, float* panels) {
  for (int64_t j = 0; j * NR < elo::padded_rows(count); ++j) {
    float* panel = panels + j * width * NR;
    for (int64_t c = 0; c < NR; ++c) {
      const int64_t r = j * NR + c;
      if (r < count)
        for (int64_t e = 0; e < width; ++e) panel[e * NR + c] = rows[r * stride + e];
      else
        for (int64_t e = 0; e < width; ++e) panel[e * NR + c] = 0.0f;
    }
  }
}

// out[e] = factor * row[e], then zeros up to the padded width.
ELO_INLINE void copy_row(const float* row, int64_t width, float factor, float* out) {
  int64_t e = 0;
  for (; e + W <= width; e += W) store(out + e, factor * load(row + e));
  for (; e < width; ++e) out[e] = factor * row[e];
  for (; e < padded_width(width); ++e) out[e] = 0.0f;
}

ELO_INLINE void clear(float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += W) store(out + i, vf{});
}

// The block padded with zeros to whole register tiles of rows and to the padded width.
static void copy_block(const float* rows, int64_t stride, int64_t count, int64_t width, float factor, float* out) {
  const int64_t wide = padded_width(width);
  for (int64_t r = 0; r < count; ++r) copy_row(rows + r * stride, width, factor, out + r * wide);
  clear(out + count * wide, (elo::padded_rows(count) - count) * wide);
}

// scores[r][c] = a[r] . columns[c], without the register tiles in which no query sees any key.
static void multiply_scores(const float* a, int64_t a_stride, const float* panels, int64_t width, int64_t rows, int64_t ahead,
                            int64_t window, float* scores) {
  for (int64_t i = 0; i < rows; i += MR)
    for (int64_t j = first_seen(i, ahead, window) / NR; j < BLOCK / NR && j * NR < i + MR + ahead; ++j) {
      multiply_tile<false>(width, a + i * a_stride, a_stride, 1, panels + j * width * NR, NR, scores + i * BLOCK + j * NR,
                           BLOCK);
    }
}

// out[r] (+)= scores[r] @ values over the keys that row r's register tile can see.
template <bool add>
static void multiply_values(const float* scores, const float* values, int64_t wide, int64_t rows, int64_t ahead,
                            int64_t window, float* out) {
  for (int64_t i = 0; i < rows; i += MR)
    for (int64_t p = 0; p < wide / NR; ++p) {
      const int64_t first = least(BLOCK, first_seen(i, ahead, window)), keys = least(BLOCK, i + MR + ahead) - first;
      if (add && keys <= 0) continue;  // without `add` the rows become 0
      multiply_tile<add>(keys, scores + i * BLOCK + first, BLOCK, 1, values + first * wide + p * NR, wide,
                         out + i * wide + p * NR, wide);
    }
}

// out[key] += scores[:, key] @ queries over the queries that can see the key's register tile.
static void multiply_transposed(const float* scores, const float* queries, int64_t wide, int64_t rows, int64_t keys,
                                int64_t ahead, int64_t window, float* out) {
  for (int64_t i = 0; i < keys; i += MR)
    for (int64_t p = 0; p < wide / NR; ++p) {
      const int64_t first = i > ahead ? i - ahead : 0, last = least(rows, i + MR - 1 + window - ahead);
      if (first >= last) continue;
      multiply_tile<true>(last - first, scores + first * BLOCK + i, 1, BLOCK, queries + first * wide + p * NR, wide,
                          out + i * wide + p * NR, wide);
    }
}

// Zeros before a row's first seen key, as far as its register tile may be read.
ELO_INLINE void clear_before(float* row, int64_t low) {
  for (int64_t c = most(0, low - MR); c < least(BLOCK, low); ++c) row[c] = 0.0f;
}

// The scores [start, end) of a row under the cap; `slopes`, where it is not null, gets their derivatives. In memory before
// anyone uses them: fused into a later subtraction, the backward pass would see other scores than the forward pass.
ELO_INLINE void cap_scores(float* row, int64_t start, int64_t end, float softcap, float* slopes) {
  for (int64_t c = start; c < end; c += W) {
    vf slope;
    store(row + c, softcap * tanh_of(load(row + c) / softcap, slope));
    if (slopes) store(slopes + c, slope);
  }
}

// Turns a square of scores into exp(score - top), rescaling what was summed where a row's maximum grows.
// Not inlined: side by side in one function, the cap's constants would take registers from the loops without it.
template <bool capped>
__attribute__((noinline)) static void weigh_scores(int64_t rows, int64_t ahead, int64_t window, float softcap,
                                                   int64_t wide, float* scores, float* acc, float* top, float* total) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * BLOCK;
    const int64_t seen = least(BLOCK, r + ahead + 1), low = first_seen(r, ahead, window);
    const int64_t start = low / W * W, end = (seen + W - 1) / W * W;
    clear_before(row, low);
    if (low >= seen) continue;  // the block lies before this row's window
    if (capped) cap_scores(row, start, end, softcap, nullptr);  // before the edges: tanh would lift -inf
    for (int64_t c = start; c < low; ++c) row[c] = -__builtin_inff();
    for (int64_t c = seen; c < end; ++c) row[c] = -__builtin_inff();
    for (int64_t c = end; c < least(BLOCK, seen + MR); ++c) row[c] = 0.0f;
    vf m = load(row + start);
    for (int64_t c = start + W; c < end; c += W) {
      const vf x = load(row + c);
      m = x > m ? x : m;
    }
    float now = max_of(m);
    if (now > top[r]) {
      const float shrink = exp_of(splat(top[r] - now))[0];
      top[r] = now;
      total[r] *= shrink;
      for (int64_t e = 0; e < wide; e += W) store(acc + r * wide + e, load(acc + r * wide + e) * shrink);
    } else {
      now = top[r];
    }
    vf sum{};
    for (int64_t c = start; c < end; c += W) {
      const vf e = exp_of(load(row + c) - now);
      store(row + c, e);
      sum += e;
    }
    total[r] += sum_of(sum);
  }
}

// Turns scores and d_out . values of a square into the probabilities p and the scores' gradients d_s. `lses` are the queries'
// log-sum-exps; under a cap their largest scores, and `logs` what is then added (see AttentionForward).
template <bool capped>
__attribute__((noinline)) static void differentiate_scores(int64_t rows, int64_t ahead, int64_t window, float softcap,
                                                           const float* lses, const float* logs, const float* deltas,
                                                           float* p, float* d_s) {
  float slopes[BLOCK];
  for (int64_t r = 0; r < rows; ++r) {
    float* p_row = p + r * BLOCK;
    float* d_row = d_s + r * BLOCK;
    const float lse = lses[r], log = capped ? logs[r] : 0.0f, delta = deltas[r];
    const int64_t seen = least(BLOCK, r + ahead + 1), low = first_seen(r, ahead, window);
    const int64_t start = low / W * W, end = (seen + W - 1) / W * W;
    if (capped) cap_scores(p_row, start, end, softcap, slopes);
    for (int64_t c = start; c < end; c += W) {
      const vf s = load(p_row + c) - lse;
      const vf e = exp_of(capped ? s - log : s), d = e * (load(d_row + c) - delta);
      store(p_row + c, e);
      store(d_row + c, capped ? d * load(slopes + c) : d);
    }
    clear_before(p_row, low);
    clear_before(d_row, low);
    for (int64_t c = seen; c < least(BLOCK, seen + MR); ++c) p_row[c] = d_row[c] = 0.0f;
  }
}

static void attention_pack(const elo::AttentionForward& a, const elo::AttentionTask& t, float* keys,
                           float* values) {
  const int64_t count = least(BLOCK, t.length - t.first), row = t.begin + t.first;
  pack_columns(a.k + row * a.k_stride + t.head * a.width, a.k_stride, count, a.width, keys);
  copy_block(a.v + row * a.v_stride + t.head * a.width, a.v_stride, count, a.width, 1.0f, values);
}

// One block of queries of one head. `keys` and `values` are the segment's packed blocks of this kv head.
static void attention_forward(const elo::AttentionForward& a, const elo::AttentionTask& t, const float* keys,
                              const float* values, float* scratch) {
  const int64_t wide = padded_width(a.width), rows = least(BLOCK, t.length - t.first), row0 = t.begin + t.first;
  float* q = scratch;
  float* scores = q + BLOCK * wide;
  float* acc = scores + BLOCK * BLOCK;
  float* top = acc + BLOCK * wide;
  float* total = top + BLOCK;
  copy_block(a.q + row0 * a.q_stride + t.head * a.width, a.q_stride, rows, a.width, a.scale, q);
  clear(acc, elo::padded_rows(rows) * wide);
  for (int64_t r = 0; r < BLOCK; ++r) {
    top[r] = -__builtin_inff();
    total[r] = 0.0f;
  }
  const int64_t oldest = most(0, t.first + 1 - a.window) / BLOCK * BLOCK;
  for (int64_t first_key = oldest; first_key < t.first + rows; first_key += BLOCK) {
    const int64_t ahead = t.first - first_key, block = first_key / BLOCK;
    multiply_scores(q, wide, keys + block * BLOCK * a.width, a.width, rows, ahead, a.window, scores);
    if (a.softcap > 0.0f)
      weigh_scores<true>(rows, ahead, a.window, a.softcap, wide, scores, acc, top, total);
    else
      weigh_scores<false>(rows, ahead, a.window, 0.0f, wide, scores, acc, top, total);
    multiply_values<true>(scores, values + block * BLOCK * wide, wide, rows, ahead, a.window, acc);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* out = a.out + ((row0 + r) * a.heads + t.head) * a.width;
    const float inverse = 1.0f / total[r];
    for (int64_t e = 0; e < a.width; ++e) out[e] = acc[r * wide + e] * inverse;
    float* lse = a.lse + t.head * a.tokens + row0 + r;
    const float log = __builtin_logf(total[r]);
    lse[0] = a.softcap > 0.0f ? top[r] : top[r] + log;
    if (a.softcap > 0.0f) lse[a.heads * a.tokens] = log;
  }
}

// One block of queries of one head: q (scaled) and d_out as contiguous blocks, and delta = sum(d_out * out).
static void attention_pack_queries(const elo::AttentionBackward& a, const elo::AttentionTask& t, float* q, float* d_out) {
  const int64_t rows = least(BLOCK, t.length - t.first), row0 = t.begin + t.first;
  copy_block(a.q + row0 * a.q_stride + t.head * a.width, a.q_stride, rows, a.width, a.scale, q);
  copy_block(a.d_out + (row0 * a.heads + t.head) * a.width, a.heads * a.width, rows, a.width, 1.0f, d_out);
  for (int64_t r = row0; r < row0 + rows; ++r) {
    const float* x = a.out + (r * a.heads + t.head) * a.width;
    const float* y = a.d_out + (r * a.heads + t.head) * a.width;
    vf sum{};
    int64_t e = 0;
    for (; e + W <= a.width; e += W) sum += load(x + e) * load(y + e);
    float s = sum_of(sum);
    for (; e < a.width; ++e) s += x[e] * y[e];
    a.delta[t.head * a.tokens + r] = s;
  }
}

// The keys [t.first, t.last) of one kv head: their d_k and d_v, and this chunk's share of the segment's d_q.
// `queries` and `d_outs` are the segment's packed blocks of the group's first query head, `head_stride` floats before the
// next one's. `d_q` holds, for each query head of the group, the rows from t.first to the last block that sees these keys
// (padded to whole register tiles), `d_q_stride` floats before the next head's.
static void attention_backward(const elo::AttentionBackward& a, const elo::AttentionTask& t, const float* queries,
                               const float* d_outs, int64_t head_stride, float* d_q, int64_t d_q_stride,
                               float* scratch) {
  const int64_t width = a.width, wide = padded_width(width), group = a.heads / a.kv_heads;
  float* key_columns = scratch;
  float* value_columns = key_columns + BLOCK * wide;
  float* key_rows = value_columns + BLOCK * wide;
  float* d_keys = key_rows + BLOCK * wide;
  float* d_values = d_keys + BLOCK * wide;
  float* p = d_values + BLOCK * wide;
  float* d_s = p + BLOCK * BLOCK;
  for (int64_t first_key = t.first; first_key < t.last; first_key += BLOCK) {
    const int64_t keys = least(BLOCK, t.length - first_key), key0 = t.begin + first_key;
    const float* k = a.k + key0 * a.k_stride + t.head * width;
    const float* v = a.v + key0 * a.v_stride + t.head * width;
    pack_columns(k, a.k_stride, keys, width, key_columns);
    pack_columns(v, a.v_stride, keys, width, value_columns);
    copy_block(k, a.k_stride, keys, width, 1.0f, key_rows);
    clear(d_keys, elo::padded_rows(keys) * wide);
    clear(d_values, elo::padded_rows(keys) * wide);
    const int64_t last = least(t.length, first_key + keys - 1 + a.window);
    for (int64_t g = 0; g < group; ++g)
      for (int64_t first = first_key; first < last; first += BLOCK) {
        const int64_t rows = least(BLOCK, t.length - first), ahead = first - first_key, row0 = t.begin + first;
        const int64_t at = (t.head * group + g) * a.tokens + row0;
        const float* q = queries + g * head_stride + first * wide;
        const float* d_out = d_outs + g * head_stride + first * wide;
        multiply_scores(q, wide, key_columns, width, rows, ahead, a.window, p);
        multiply_scores(d_out, wide, value_columns, width, rows, ahead, a.window, d_s);
        if (a.softcap > 0.0f)
          differentiate_scores<true>(rows, ahead, a.window, a.softcap, a.lse + at, a.lse + a.heads * a.tokens + at,
                                     a.delta + at, p, d_s);
        else
          differentiate_scores<false>(rows, ahead, a.window, 0.0f, a.lse + at, nullptr, a.delta + at, p, d_s);
        multiply_transposed(p, d_out, wide, rows, keys, ahead, a.window, d_values);
        multiply_transposed(d_s, q, wide, rows, keys, ahead, a.window, d_keys);
        float* d_q_rows = d_q + g * d_q_stride + (first - t.first) * wide;
        if (first_key == t.first || ahead + 1 >= a.window)  // no earlier keys of the chunk are seen from here
          multiply_values<false>(d_s, key_rows, wide, rows, ahead, a.window, d_q_rows);
        else
          multiply_values<true>(d_s, key_rows, wide, rows, ahead, a.window, d_q_rows);
      }
    for (int64_t r = 0; r < keys; ++r)
      for (int64_t e = 0; e < width; ++e) {
        a.d_k[((key0 + r) * a.kv_heads + t.head) * width + e] = d_keys[r * wide + e];
        a.d_v[((key0 + r) * a.kv_heads + t.head) * width + e] = d_values[r * wide + e];
      }
  }
}

}  // namespace ELO_ISA
