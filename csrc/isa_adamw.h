// The AdamW step with moments of 8 bits on groups of 256 elements. Included by kernels_<isa>.cpp after isa_vec.h.
//
// elo_engine/model/reference_adamw.py defines the step, and this is the same bit for bit on every instruction set: a
// run goes on unchanged on another processor, or without the extension. So each operation is rounded by itself, in that
// file's order: no multiplication may fuse with an addition (below), roots and quotients are exact, and a constant
// divided by x is x's reciprocal times the constant, which is what torch makes of it.

#pragma GCC push_options
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
// AVX2's kernels have FMA, AVX-512 and AArch64 always do. Without errno a root is one instruction.
#pragma GCC optimize("fp-contract=off", "no-math-errno")
#endif

namespace ELO_ISA {

using elo::GROUP;

typedef unsigned vu __attribute__((vector_size(4 * ELO_W)));
typedef int vi_any __attribute__((vector_size(4 * ELO_W), aligned(4), may_alias));
typedef uint32_t bits_any __attribute__((may_alias));

ELO_INLINE void store_int(int32_t* p, vi x) { *(vi_any*)p = (vi_any)x; }
ELO_INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

ELO_INLINE vf root_of(vf x) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if ELO_W == 16
  return __builtin_ia32_sqrtps512_mask(x, x, -1, 4);  // all lanes, the current rounding
#elif ELO_W == 8
  return __builtin_ia32_sqrtps256(x);
#else
  return __builtin_ia32_sqrtps(x);
#endif
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// The larger, or a NaN once there was one: a broken state stays to be seen.
ELO_INLINE vf keep_larger(vf top, vf x) { return (x > top) | (x != x) ? x : top; }

ELO_INLINE float largest_of(vf x) {
  float top = x[0];
  for (int i = 1; i < W; ++i) top = x[i] > top || x[i] != x[i] ? x[i] : top;
  return top;
}

// The 32-bit finaliser of MurmurHash3 with a key in its middle.
ELO_INLINE vu mix(vu x, uint32_t key) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13) ^ key) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// low + 1 with probability (value - below) / (above - below), else low. `bits`: 16 of them.
ELO_INLINE vf round_up(vf low, vf below, vf above, vf value, vu bits) {
  const vf chance = (__builtin_convertvector((vi)bits, vf) + 0.5f) * 0x1p-16f;
  return chance * (above - below) < value - below ? low + 1.0f : low;
}

// The code below; a whole number may give the one before it, and is then rounded up with certainty.
ELO_INLINE vf low_of(vf at, float most) {
  vf low = at - 0.5f;
  low = (low < 0.0f ? vf{} : low) + 0x1p23f - 0x1p23f;
  return low > most ? splat(most) : low;
}

// Bytes and bf16 are widened and narrowed a group at a time, in loops that the compiler turns into the set's own moves.
ELO_INLINE const float* widen(const float* x, float*) { return x; }
ELO_INLINE const float* widen(const uint16_t* x, float* buffer) {
  for (int64_t i = 0; i < GROUP; ++i) ((bits_any*)buffer)[i] = (uint32_t)x[i] << 16;
  return buffer;
}

ELO_INLINE void store_weight(float* weight, int32_t*, int64_t i, vf exact, vu) { store(weight + i, exact); }
ELO_INLINE void store_weight(uint16_t*, int32_t* buffer, int64_t i, vf exact, vu bits) {
  const vu value = (vu)exact, rounded = value + (bits & 0xffffu);
  // Beyond the largest bf16 the sum would read as infinity: cut there.
  const vu kept = (rounded & 0x7f800000u) == 0x7f800000u ? value : rounded;
  store_int(buffer + i, (vi)(kept >> 16));
}

ELO_INLINE void narrow(const int32_t*, float*) {}
template <class To>
ELO_INLINE void narrow(const int32_t* x, To* out) {
  for (int64_t i = 0; i < GROUP; ++i) out[i] = (To)x[i];
}

// One whole group; `first` is its first element within tensor `t`. Two passes, since codes need the group's largest
// moments. `a` is a copy: behind a reference a stored weight might have changed it.
template <class Grad, class Weight>
__attribute__((noinline)) static void update_group(elo::AdamwStep a, const elo::AdamwTensor& t, uint32_t first,
                                                   const Grad* grad, Weight* weight, int8_t* m_codes, uint8_t* v_codes,
                                                   float* m_scale, float* v_scale) {
  alignas(64) float g_wide[GROUP], w_wide[GROUP], m_group[GROUP], v_group[GROUP];
  alignas(64) int32_t m_new[GROUP], v_new[GROUP], w_new[GROUP];
  const float* gs = widen(grad, g_wide);
  const float* ws = widen(weight, w_wide);
  for (int64_t i = 0; i < GROUP; ++i) m_group[i] = m_codes[i];
  for (int64_t i = 0; i < GROUP; ++i) v_group[i] = v_codes[i];

  vf m_top{}, v_top{};
  for (int64_t i = 0; i < GROUP; i += W) {
    const vf g = load(gs + i) * a.factor;
    const vf m_share = load(m_group + i) * (float)(1.0 / 127.0);
    vf v_share = load(v_group + i) * (float)(1.0 / 255.0);
    v_share = v_share * v_share;
    vf m = m_share * magnitude(m_share) * m_scale[0];
    vf v = v_share * v_share * v_scale[0];
    m = m + (g - m) * a.rate1;
    v = v + (g * g - v) * a.rate2;
    m_top = keep_larger(m_top, magnitude(m));
    v_top = keep_larger(v_top, v);
    store(m_group + i, m);
    store(v_group + i, v);
  }

  const float m_most = largest_of(m_top), v_most = largest_of(v_top);
  const vf m_root = root_of(splat(m_most)), v_root = root_of(root_of(splat(v_most)));
  // Below 2^-120 the roots would lose their meaning, and the moments have none beside eps.
  const float m_steps = m_most > 0x1p-120f ? 1.0f / m_root[0] * 127.0f : 0.0f;
  const float v_steps = v_most > 0x1p-120f ? 1.0f / v_root[0] * 255.0f : 0.0f;
  *m_scale = m_most;
  *v_scale = v_most;

  vu seed;
  for (int i = 0; i < W; ++i) seed[i] = (first + (uint32_t)i) * 0x9e3779b1u + t.base;
  for (int64_t i = 0; i < GROUP; i += W, seed += W * 0x9e3779b1u) {
    const vf m = load(m_group + i), v = load(v_group + i), root = root_of(v), old = load(ws + i);
    const vu bits = mix(seed, t.key);
    const vf change = old * a.decay + a.step * m / (root * a.root + a.eps);
    store_weight(weight, w_new, i, old - change, bits);

    const vf m_at = root_of(magnitude(m)) * m_steps, m_low = low_of(m_at, 126.0f), m_low2 = m_low * m_low;
    const vf m_code = round_up(m_low, m_low2, m_low2 + 2.0f * m_low + 1.0f, m_at * m_at, bits >> 16);
    store_int(m_new + i, __builtin_convertvector(m < 0.0f ? -m_code : m_code, vi));

    vf v_at = root_of(root) * v_steps;
    const vf v_low = low_of(v_at, 254.0f), below = v_low * v_low, above = below + 2.0f * v_low + 1.0f;
    v_at = v_at * v_at;
    // These 16 bits are independent of each half of `bits`.
    vf v_code = round_up(v_low, below * below, above * above, v_at * v_at, bits * 0x9e3779b1u >> 16);
    v_code = (v > 0.0f) & (v_code < 1.0f) ? splat(1.0f) : v_code;  // its root is a divisor
    store_int(v_new + i, __builtin_convertvector(v_code, vi));
  }
  narrow(m_new, m_codes);
  narrow(v_new, v_codes);
  narrow(w_new, weight);
}

template <class Grad, class Weight>
static void update_groups(const elo::AdamwStep& a, const elo::AdamwTensor& t, int64_t begin, int64_t end) {
  const Grad* grad = (const Grad*)t.grad;
  Weight* weight = (Weight*)t.weight;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * GROUP, left = t.count - first;
    float* m_scale = t.m_scales + group;
    float* v_scale = t.v_scales + group;
    if (left >= GROUP) {
      update_group(a, t, (uint32_t)first, grad + first, weight + first, t.m_codes + first, t.v_codes + first, m_scale,
                   v_scale);
      continue;
    }
    // The last, partial group, beside zeros, which stay zero and are nobody's maximum.
    Grad g[GROUP] = {};
    Weight w[GROUP] = {};
    int8_t m[GROUP] = {};
    uint8_t v[GROUP] = {};
    for (int64_t i = 0; i < left; ++i) {
      g[i] = grad[first + i];
      w[i] = weight[first + i];
      m[i] = t.m_codes[first + i];
      v[i] = t.v_codes[first + i];
    }
    update_group(a, t, (uint32_t)first, g, w, m, v, m_scale, v_scale);
    for (int64_t i = 0; i < left; ++i) {
      weight[first + i] = w[i];
      t.m_codes[first + i] = m[i];
      t.v_codes[first + i] = v[i];
    }
  }
}

// The groups [begin, end) of one tensor.
static void adamw_groups(const elo::AdamwStep& a, const elo::AdamwTensor& t, int64_t begin, int64_t end) {
  if (a.grad_bf16 && a.weight_bf16)
    update_groups<uint16_t, uint16_t>(a, t, begin, end);
  else if (a.grad_bf16)
    update_groups<uint16_t, float>(a, t, begin, end);
  else if (a.weight_bf16)
    update_groups<float, uint16_t>(a, t, begin, end);
  else
    update_groups<float, float>(a, t, begin, end);
}

}  // namespace ELO_ISA

#pragma GCC pop_options
