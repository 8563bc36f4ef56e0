// Uninitialised floats on a cache line's boundary.
#pragma once
#include <cstdint>
#include <memory>
#include <new>

namespace elo {

struct ReleaseFloats {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], ReleaseFloats>;

inline Floats allocate(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  return Floats(static_cast<float*>(::operator new[](bytes, std::align_val_t(64))));
}

}  // namespace elo
