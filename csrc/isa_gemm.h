// The one matrix-multiply kernel: MR x NR outputs held in registers. Included by kernels_<isa>.cpp (see isa_vec.h).

namespace ELO_ISA {

constexpr int NV = 2;                 // vectors across
constexpr int NR = NV * W;            // columns of a register tile
constexpr int MR = W == 16 ? 12 : 6;  // rows: 12 accumulators of 16 registers, 24 of 32

// C[MR, NR] (+)= A[MR, k] B[k, NR]; A's element (m, i) lies at a[m * a_m + i * a_k], so A may be a transpose.
template <bool add>
ELO_INLINE void multiply_tile(int64_t k, const float* a, int64_t a_m, int64_t a_k, const float* b, int64_t b_k, float* c,
                              int64_t c_m) {
  vf sum[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    sum[m][0] = vf{};
    sum[m][1] = vf{};
  }
  for (int64_t i = 0; i < k; ++i) {
    const vf b0 = load(b + i * b_k), b1 = load(b + i * b_k + W);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const vf x = splat(a[m * a_m + i * a_k]);
      sum[m][0] += x * b0;
      sum[m][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    // What was there is added last: a long sum in blocks rounds less than one chain from end to end.
    store(c + m * c_m, add ? load(c + m * c_m) + sum[m][0] : sum[m][0]);
    store(c + m * c_m + W, add ? load(c + m * c_m + W) + sum[m][1] : sum[m][1]);
  }
}

}  // namespace ELO_ISA
