// The kernels on 16-wide vectors with fused multiply-add.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx2,fma")
#define ELO_ISA avx512
#define ELO_W 16
#include "isa_vec.h"
#include "isa_softmax.h"
#include "isa_gemm.h"
#include "isa_attention.h"
#include "isa_head.h"
#include "isa_adamw.h"

namespace elo {
// Constant-initialised: no code of this file runs unless the processor was asked first.
const Kernels avx512_kernels = {"avx512",
                                avx512::softmax_tile,
                                avx512::padded_width,
                                avx512::attention_pack,
                                avx512::attention_forward,
                                avx512::attention_pack_queries,
                                avx512::attention_backward,
                                avx512::head_block,
                                avx512::adamw_groups};
}  // namespace elo
#endif
