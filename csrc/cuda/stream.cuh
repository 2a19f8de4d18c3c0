// Reading indices out of the bit streams of a checkpoint.
#pragma once

#include "kernels.h"

namespace vptq {

// The whole merged index; the words of a stream are followed by at least one more word, whatever it holds.
__device__ __forceinline__ unsigned merged_index(const int32_t* row_words, int bits, int column) {
  const int64_t at = int64_t(column) * bits;
  const int32_t* p = row_words + (at >> 5);
  const unsigned low = __ldg(p), high = __ldg(p + 1);
  const unsigned value = __funnelshift_r(low, high, at & 31);
  return bits == 32 ? value : value & ((1u << bits) - 1);
}

__device__ __forceinline__ unsigned stream_index(const Stream& s, int row, int column) {
  const unsigned merged = merged_index(s.words + size_t(row) * s.row_words, s.bits, column);
  return merged >> s.shift & ((1u << s.width) - 1);
}

}  // namespace vptq
