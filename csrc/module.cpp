// elo_engine._csrc: the binding of the kernels (the mover's is bind_mover.cpp). Addresses and sizes come from
// elo_engine.model.cpu_native, which has checked dtype, device
// and layout; here they are checked once more against what would crash: null, negative, overflow.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_mover.h"
#include "drivers.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address, const char* what) {
  if (address == 0) throw std::invalid_argument(std::string(what) + " is a null address");
  if (address % alignof(T)) throw std::invalid_argument(std::string(what) + " is not aligned to its element");
  return reinterpret_cast<T*>(address);
}

// a * b elements of 8 bytes at most must be addressable.
void check_size(int64_t a, int64_t b, const char* what) {
  int64_t count = 0;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &count) || count > INT64_MAX / 64)
    throw std::invalid_argument(std::string(what) + ": a size is negative or overflows");
}

const elo::Kernels& chosen(const std::string& isa) {
  const elo::Kernels* kernels = elo::find_kernels(isa.c_str());
  if (!kernels) throw std::invalid_argument("instruction set '" + isa + "' is unknown or this processor does not have it");
  return *kernels;
}

void softmax_tile(Address tile, int64_t rows, int64_t cols, int64_t tile_stride, Address labels, int64_t col_begin,
                  Address running_max, Address running_sum, Address acc, int64_t acc_cols, int64_t acc_stride,
                  const std::string& isa) {
  check_size(rows, tile_stride, "tile");
  check_size(rows, acc_stride, "accumulator");
  if (cols < 0 || cols > tile_stride || acc_cols < 0 || acc_cols > acc_stride || col_begin < 0)
    throw std::invalid_argument("tile: a stride is smaller than its row, or a column is negative");
  const elo::Kernels& kernels = chosen(isa);
  if (rows == 0 || cols == 0) return;
  const elo::SoftmaxTile a{pointer<float>(tile, "tile"),
                           rows,
                           cols,
                           tile_stride,
                           pointer<const int64_t>(labels, "labels"),
                           col_begin,
                           pointer<float>(running_max, "running maximum"),
                           pointer<float>(running_sum, "running sum"),
                           acc ? pointer<float>(acc, "accumulator") : nullptr,
                           acc_cols,
                           acc_stride};
  py::gil_scoped_release release;
  elo::run_softmax_tile(kernels, a);
}

void frozen_head(Address hidden, Address weight, Address labels, int64_t rows, int64_t width, int64_t vocabulary,
                 Address running_max, Address running_sum, Address acc, const std::string& isa) {
  check_size(rows, width, "hidden");
  check_size(vocabulary, width, "head");
  if (width < 32 || width % 32 || vocabulary < 1) throw std::invalid_argument("head: the width must be a multiple of 32");
  const elo::Kernels& kernels = chosen(isa);
  if (rows == 0) return;
  const elo::FrozenHead a{pointer<const float>(hidden, "hidden"),
                          pointer<const float>(weight, "head"),
                          pointer<const int64_t>(labels, "labels"),
                          rows,
                          width,
                          vocabulary,
                          pointer<float>(running_max, "running maximum"),
                          pointer<float>(running_sum, "running sum"),
                          acc ? pointer<float>(acc, "accumulator") : nullptr};
  py::gil_scoped_release release;
  elo::run_frozen_head(kernels, a);
}

void check_attention(int64_t tokens, int64_t heads, int64_t kv_heads, int64_t width, int64_t q_stride, int64_t k_stride,
                     int64_t v_stride, const std::vector<int64_t>& starts, int64_t window, float softcap) {
  if (heads < 1 || kv_heads < 1 || heads % kv_heads || width < 1 || width > 1024 || heads > (1 << 20))
    throw std::invalid_argument("attention: heads must be a multiple of the kv heads, the width between 1 and 1024");
  if (q_stride < heads * width || k_stride < kv_heads * width || v_stride < kv_heads * width)
    throw std::invalid_argument("attention: a row's stride is smaller than the row");
  check_size(tokens, q_stride, "q");
  check_size(tokens, k_stride, "k");
  check_size(tokens, v_stride, "v");
  if (starts.size() < 2 || starts.front() != 0 || starts.back() != tokens)
    throw std::invalid_argument("attention: segment starts must run from 0 to the number of tokens");
  for (size_t i = 1; i < starts.size(); ++i)
    if (starts[i] <= starts[i - 1]) throw std::invalid_argument("attention: segment starts must grow strictly");
  if (window < 0) throw std::invalid_argument("attention: the window must be positive, or 0 for none");
  if (!(softcap >= 0.0f) || !std::isfinite(softcap) || (softcap > 0.0f && !std::isfinite(1.0f / softcap)))
    throw std::invalid_argument("attention: the softcap must be positive, or 0 for none, and it and its inverse finite");
}

// The kernels know no missing window: one of all tokens cuts nothing off.
int64_t whole(int64_t window, int64_t tokens) { return window == 0 ? tokens : std::min(window, tokens); }

void attention_forward(Address q, Address k, Address v, int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t tokens,
                       int64_t heads, int64_t kv_heads, int64_t width, float scale, Address out, Address lse,
                       const std::vector<int64_t>& starts, const std::string& isa, int64_t window, float softcap) {
  check_attention(tokens, heads, kv_heads, width, q_stride, k_stride, v_stride, starts, window, softcap);
  const elo::AttentionForward a{pointer<const float>(q, "q"),
                                pointer<const float>(k, "k"),
                                pointer<const float>(v, "v"),
                                q_stride,
                                k_stride,
                                v_stride,
                                tokens,
                                heads,
                                kv_heads,
                                width,
                                scale,
                                whole(window, tokens),
                                softcap,
                                pointer<float>(out, "out"),
                                pointer<float>(lse, "lse")};
  const elo::Kernels& kernels = chosen(isa);
  py::gil_scoped_release release;
  elo::run_attention_forward(kernels, a, starts);
}

void attention_backward(Address q, Address k, Address v, int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t tokens,
                        int64_t heads, int64_t kv_heads, int64_t width, float scale, Address out, Address d_out, Address lse,
                        Address d_q, Address d_k, Address d_v, Address delta, const std::vector<int64_t>& starts,
                        const std::string& isa, int64_t window, float softcap) {
  check_attention(tokens, heads, kv_heads, width, q_stride, k_stride, v_stride, starts, window, softcap);
  const elo::AttentionBackward a{pointer<const float>(q, "q"),
                                 pointer<const float>(k, "k"),
                                 pointer<const float>(v, "v"),
                                 q_stride,
                                 k_stride,
                                 v_stride,
                                 tokens,
                                 heads,
                                 kv_heads,
                                 width,
                                 scale,
                                 whole(window, tokens),
                                 softcap,
                                 pointer<const float>(out, "out"),
                                 pointer<const float>(d_out, "d_out"),
                                 pointer<const float>(lse, "lse"),
                                 pointer<float>(d_q, "d_q"),
                                 pointer<float>(d_k, "d_k"),
                                 pointer<float>(d_v, "d_v"),
                                 pointer<float>(delta, "delta")};
  const elo::Kernels& kernels = chosen(isa);
  py::gil_scoped_release release;
  elo::run_attention_backward(kernels, a, starts);
}

// reference_adamw.mix, for what all elements of a tensor share.
uint32_t mixed(uint32_t x, uint32_t key) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13) ^ key) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// addresses: gradient, weight, codes and scales of each tensor; numbers: its place in the model, which its random bits
// depend on; of_step: factor, step, root, rate1, rate2, eps, decay.
void adamw_8bit(const std::vector<std::array<Address, 6>>& addresses, const std::vector<int64_t>& counts,
                const std::vector<int64_t>& numbers, bool grad_bf16, bool weight_bf16, const std::array<float, 7>& of_step,
                int64_t key, const std::string& isa) {
  if (addresses.size() != counts.size() || addresses.size() != numbers.size())
    throw std::invalid_argument("adamw: one count and one number for each tensor");
  if (key < 0 || key > UINT32_MAX) throw std::invalid_argument("adamw: the key must have 32 bits");
  const elo::Kernels& kernels = chosen(isa);
  std::vector<elo::AdamwTensor> tensors;
  for (size_t i = 0; i < counts.size(); ++i) {
    check_size(counts[i], 1, "adamw");
    if (numbers[i] < 0) throw std::invalid_argument("adamw: a tensor's number is negative");
    if (counts[i] == 0) continue;  // such a tensor may have no address
    const auto& [grad, weight, m_codes, v_codes, m_scales, v_scales] = addresses[i];
    const uint32_t base = mixed(static_cast<uint32_t>(key) + static_cast<uint32_t>(numbers[i]) * 0x9e3779b9u, 0);
    const void* grads = grad_bf16 ? static_cast<const void*>(pointer<const uint16_t>(grad, "gradient"))
                                  : static_cast<const void*>(pointer<const float>(grad, "gradient"));
    void* weights = weight_bf16 ? static_cast<void*>(pointer<uint16_t>(weight, "weight"))
                                : static_cast<void*>(pointer<float>(weight, "weight"));
    tensors.push_back({grads, weights, pointer<int8_t>(m_codes, "exp_avg"), pointer<uint8_t>(v_codes, "exp_avg_sq"),
                       pointer<float>(m_scales, "exp_avg's scales"), pointer<float>(v_scales, "exp_avg_sq's scales"),
                       counts[i], base, mixed(base, base)});
  }
  const auto& [factor, step, root, rate1, rate2, eps, decay] = of_step;
  const elo::AdamwStep a{factor, step, root, rate1, rate2, eps, decay, grad_bf16, weight_bf16};
  py::gil_scoped_release release;
  elo::run_adamw(kernels, a, tensors);
}

}  // namespace

PYBIND11_MODULE(_csrc, m) {
  m.doc() = "C++ of elo_engine; elo_engine.model.cpu_native and elo_engine.checkpoint.mover are its checked interfaces.";
  m.attr("INTERFACE") = 5;  // elo_engine/native.py refuses an extension left over from another version
  m.def("instruction_set", [](const std::string& isa) { return std::string(chosen(isa).name); }, py::arg("isa") = "auto");
  m.def("softmax_tile", &softmax_tile);
  m.def("frozen_head", &frozen_head);
  m.def("attention_forward", &attention_forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_stride"),
        py::arg("k_stride"), py::arg("v_stride"), py::arg("tokens"), py::arg("heads"), py::arg("kv_heads"), py::arg("width"),
        py::arg("scale"), py::arg("out"), py::arg("lse"), py::arg("starts"), py::arg("isa"), py::arg("window") = 0,
        py::arg("softcap") = 0.0f);
  m.def("attention_backward", &attention_backward);
  m.def("adamw_8bit", &adamw_8bit);
  elo::bind_mover(m);
}
