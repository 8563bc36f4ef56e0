// Vectors of W floats through GCC's vector extension, so that one source serves every instruction set.
//
// This header has no include guard on purpose: each kernels_<isa>.cpp includes it once, after its `#pragma GCC target`, with
// ELO_ISA (a namespace) and ELO_W (floats in a vector) defined. Nothing here may include a standard header or instantiate a
// library template: such code would be compiled for the wide target, merged by the linker with the portable copy, and crash
// an older processor.

#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors are passed only where everything is inlined

namespace ELO_ISA {

constexpr int W = ELO_W;
typedef float vf __attribute__((vector_size(4 * ELO_W)));
typedef int vi __attribute__((vector_size(4 * ELO_W)));
typedef float vf_any __attribute__((vector_size(4 * ELO_W), aligned(4), may_alias));  // an address of any float

#define ELO_INLINE static inline __attribute__((always_inline))

ELO_INLINE vf load(const float* p) { return (vf)(*(const vf_any*)p); }
ELO_INLINE void store(float* p, vf x) { *(vf_any*)p = (vf_any)x; }
ELO_INLINE vf splat(float x) { return x - vf{}; }

ELO_INLINE float sum_of(vf x) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += x[i];
  return s;
}
ELO_INLINE float max_of(vf x) {
  float m = x[0];
  for (int i = 1; i < W; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// exp for arguments up to 88. Below -87.3 the result is 0 (it would leave the normal floats); a NaN stays a NaN, because
// every comparison keeps the argument when it is false. Cody-Waite reduction to [-ln2/2, ln2/2], then the degree-5
// polynomial of Cephes' expf; tests/test_csrc.py holds it to 2 ulp.
ELO_INLINE vf exp_of(vf x) {
  const float lowest = -87.3f;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  vf t = x < lowest ? splat(lowest) : x;
  vf z = t * 1.44269504088896341f + magic;
  vf n = z - magic;
  vf r = t - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vi exponent = ((vi)z + (127 - 0x4b400000)) << 23;
  vf y = p * (vf)exponent;
  return x < lowest ? vf{} : y;
}

}  // namespace ELO_ISA
