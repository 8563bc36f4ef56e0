// The kernels on 4-wide vectors: SSE2 on x86-64, NEON on AArch64, plain scalars anywhere else; and the choice among the sets.
#include "kernels.h"

#include <cstring>

#define ELO_ISA base
#define ELO_W 4
#include "isa_vec.h"
#include "isa_softmax.h"
#include "isa_gemm.h"
#include "isa_attention.h"
#include "isa_head.h"
#include "isa_adamw.h"

namespace elo {

const Kernels base_kernels = {"base",
                              base::softmax_tile,
                              base::padded_width,
                              base::attention_pack,
                              base::attention_forward,
                              base::attention_pack_queries,
                              base::attention_backward,
                              base::head_block,
                              base::adamw_groups};

const Kernels* find_kernels(const char* name) {
  const bool any = std::strcmp(name, "auto") == 0;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if ((any || std::strcmp(name, "avx512") == 0) && __builtin_cpu_supports("avx512f")) return &avx512_kernels;
  if ((any || std::strcmp(name, "avx2") == 0) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &avx2_kernels;
#endif
  return any || std::strcmp(name, "base") == 0 ? &base_kernels : nullptr;
}

}  // namespace elo
