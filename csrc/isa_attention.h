// Causal attention of one head on one block of queries (forward) or keys (backward).
// Included by kernels_<isa>.cpp after isa_gemm.h (see isa_vec.h).
//
// Flash attention (Dao et al., arXiv 2205.14135): scores live only as one BLOCK x BLOCK square, the forward pass keeps the
// output and the log-sum-exp, the backward pass makes the probabilities again. Causality is used at the grain of a register
// tile: a tile wholly in the future is skipped, and sums over keys or queries run exactly over the part that counts.
// Operands that a register tile reads by columns are packed into panels of NR columns, zero-padded, so that no tile needs
// an edge case; only what is copied out is cut to size.

namespace ELO_ISA {

using elo::BLOCK;

ELO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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

// scores[r][c] = a[r] . columns[c], without the register tiles in which every key comes after every query.
// `ahead` is the first query's position minus the first key's.
static void multiply_scores(const float* a, int64_t a_stride, const float* panels, int64_t width, int64_t rows, int64_t ahead,
                            float* scores) {
  for (int64_t i = 0; i < rows; i += MR)
    for (int64_t j = 0; j < BLOCK / NR && j * NR < i + MR + ahead; ++j) {
      multiply_tile<false>(width, a + i * a_stride, a_stride, 1, panels + j * width * NR, NR, scores + i * BLOCK + j * NR,
                           BLOCK);
    }
}

// out[r] (+)= scores[r] @ values over the keys that row r's register tile can see.
template <bool add>
static void multiply_values(const float* scores, const float* values, int64_t wide, int64_t rows, int64_t ahead, float* out) {
  for (int64_t i = 0; i < rows; i += MR)
    for (int64_t p = 0; p < wide / NR; ++p) {
      const int64_t keys = least(BLOCK, i + MR + ahead);
      if (keys <= 0) continue;
      multiply_tile<add>(keys, scores + i * BLOCK, BLOCK, 1, values + p * NR, wide, out + i * wide + p * NR, wide);
    }
}

// out[key] += scores[:, key] @ queries over the queries that can see the key's register tile.
static void multiply_transposed(const float* scores, const float* queries, int64_t wide, int64_t rows, int64_t keys,
                                int64_t ahead, float* out) {
  for (int64_t i = 0; i < keys; i += MR)
    for (int64_t p = 0; p < wide / NR; ++p) {
      const int64_t first = i > ahead ? i - ahead : 0;
      if (first >= rows) continue;
      multiply_tile<true>(rows - first, scores + first * BLOCK + i, 1, BLOCK, queries + first * wide + p * NR, wide,
                          out + i * wide + p * NR, wide);
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
  for (int64_t first_key = 0; first_key < t.first + rows; first_key += BLOCK) {
    const int64_t ahead = t.first - first_key, block = first_key / BLOCK;
    multiply_scores(q, wide, keys + block * BLOCK * a.width, a.width, rows, ahead, scores);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * BLOCK;
      const int64_t seen = least(BLOCK, r + ahead + 1);  // at least 1: blocks of queries and keys share one grid
      const int64_t end = (seen + W - 1) / W * W;
      for (int64_t c = seen; c < end; ++c) row[c] = -__builtin_inff();
      for (int64_t c = end; c < least(BLOCK, seen + MR); ++c) row[c] = 0.0f;
      vf m = load(row);
      for (int64_t c = W; c < end; c += W) {
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
      for (int64_t c = 0; c < end; c += W) {
        const vf e = exp_of(load(row + c) - now);
        store(row + c, e);
        sum += e;
      }
      total[r] += sum_of(sum);
    }
    multiply_values<true>(scores, values + block * BLOCK * wide, wide, rows, ahead, acc);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* out = a.out + ((row0 + r) * a.heads + t.head) * a.width;
    const float inverse = 1.0f / total[r];
    for (int64_t e = 0; e < a.width; ++e) out[e] = acc[r * wide + e] * inverse;
    a.lse[t.head * a.tokens + row0 + r] = top[r] + __builtin_logf(total[r]);
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
// next one's. `d_q` holds, for each query head of the group, the rows from t.first to the segment's end (padded to whole
// register tiles).
static void attention_backward(const elo::AttentionBackward& a, const elo::AttentionTask& t, const float* queries,
                               const float* d_outs, int64_t head_stride, float* d_q, float* scratch) {
  const int64_t width = a.width, wide = padded_width(width), group = a.heads / a.kv_heads;
  const int64_t part = elo::padded_rows(t.length - t.first) * wide;
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
    for (int64_t g = 0; g < group; ++g)
      for (int64_t first = first_key; first < t.length; first += BLOCK) {
        const int64_t rows = least(BLOCK, t.length - first), ahead = first - first_key, row0 = t.begin + first;
        const int64_t head = t.head * group + g;
        const float* q = queries + g * head_stride + first * wide;
        const float* d_out = d_outs + g * head_stride + first * wide;
        multiply_scores(q, wide, key_columns, width, rows, ahead, p);
        multiply_scores(d_out, wide, value_columns, width, rows, ahead, d_s);
        for (int64_t r = 0; r < rows; ++r) {
          float* p_row = p + r * BLOCK;
          float* d_row = d_s + r * BLOCK;
          const float lse = a.lse[head * a.tokens + row0 + r], delta = a.delta[head * a.tokens + row0 + r];
          const int64_t seen = least(BLOCK, r + ahead + 1), end = (seen + W - 1) / W * W;
          for (int64_t c = 0; c < end; c += W) {
            const vf e = exp_of(load(p_row + c) - lse);
            store(p_row + c, e);
            store(d_row + c, e * (load(d_row + c) - delta));
          }
          for (int64_t c = seen; c < least(BLOCK, seen + MR); ++c) p_row[c] = d_row[c] = 0.0f;
        }
        multiply_transposed(p, d_out, wide, rows, keys, ahead, d_values);
        multiply_transposed(d_s, q, wide, rows, keys, ahead, d_keys);
        float* d_q_rows = d_q + g * part + (first - t.first) * wide;
        if (first_key == t.first)  // the chunk's first keys are seen by every query here
          multiply_values<false>(d_s, key_rows, wide, rows, ahead, d_q_rows);
        else
          multiply_values<true>(d_s, key_rows, wide, rows, ahead, d_q_rows);
      }
    for (int64_t r = 0; r < keys; ++r)
      for (int64_t e = 0; e < width; ++e) {
        a.d_k[((key0 + r) * a.kv_heads + t.head) * width + e] = d_keys[r * wide + e];
        a.d_v[((key0 + r) * a.kv_heads + t.head) * width + e] = d_values[r * wide + e];
      }
  }
}

}  // namespace ELO_ISA
