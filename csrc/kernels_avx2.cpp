// The kernels on 8-wide vectors with fused multiply-add.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define ELO_ISA avx2
#define ELO_W 8
#include "isa_vec.h"
#include "isa_softmax.h"
#include "isa_gemm.h"
#include "isa_attention.h"
#include "isa_head.h"
#include "isa_adamw.h"

namespace elo {
// Constant-initialised: no code of this file runs unless the processor was asked first.
const Kernels avx2_kernels = {"avx2",
                              avx2::softmax_tile,
                              avx2::padded_width,
                              avx2::attention_pack,
                              avx2::attention_forward,
                              avx2::attention_pack_queries,
                              avx2::attention_backward,
                              avx2::head_block,
                              avx2::adamw_groups};
}  // namespace elo
#endif
