// Vector lengths as constants, for kernels that keep vectors in registers. Included behind CUDA's own header.
#pragma once

#include <cstdint>
#include <type_traits>

namespace {

// Calls f with the vector length as a constant; -1 for one that the format does not have, else CUDA's error, 0 for
// none.
template <int V = 2, typename F>
int with_vector_length(int64_t v, F&& f) {
  if constexpr (V > 16) {
    return -1;
  } else {
    if (v != V) return with_vector_length<V + 1>(v, f);
    f(std::integral_constant<int, V>());
    return cudaGetLastError();
  }
}

}  // namespace
