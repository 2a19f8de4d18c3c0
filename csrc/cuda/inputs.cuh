// Where a kernel gets its activations: scaled by the norm of the columns, and gathered through a column list. A scaled
// activation is rounded once to the activations' type.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace vptq {

template <typename T>
struct Inputs {
  const T* x;
  int64_t row_stride;
  int count;
  // Meaningful if there are such. (Flags rather than null: for `if (pointer)` after a choice between null and an
  // offset, ptxas 13.0 let the comparison read the register before the zero was in it, and lists were read that are not
  // there.)
  const float* scale;
  const int32_t* list;
  bool has_scale, has_list;
  bool paired;  // pairs of columns are aligned pairs in memory
  bool plain;   // and nothing need be done to them

  __device__ Inputs(const Layer& layer, const Tokens& tokens, const Job& job)
      : x(static_cast<const T*>(tokens.x)),
        row_stride(tokens.row_stride),
        count(tokens.count),
        scale(layer.norm + job.scale),
        list(layer.columns + job.column_list),
        has_scale(job.scale >= 0),
        has_list(job.column_list >= 0),
        paired(!has_list && tokens.row_stride % 2 == 0 && job.column_end % 2 == 0),
        plain(paired && !has_scale) {}

  // A token's activation for a column of the segment; zero if there is no such token.
  __device__ __forceinline__ T operator()(int token, int column) const {
    if (token >= count) return Number<T>::narrow(0.f);
    const int source = has_list ? __ldg(list + column) : column;
    const T value = x[token * row_stride + source];
    return has_scale ? Number<T>::narrow(Number<T>::wide(value) * __ldg(scale + source)) : value;
  }

  // Columns `column` (even) and `column + 1`, of which those at or beyond `end` count as zero.
  __device__ unsigned pair(int token, int column, int end) const {
    const T zero = Number<T>::narrow(0.f);
    const T low = column < end ? (*this)(token, column) : zero;
    return pack(low, column + 1 < end ? (*this)(token, column + 1) : zero);
  }

  // As they are in memory, where `paired`, for columns before the end.
  __device__ __forceinline__ const unsigned* pairs(int token, int column) const {
    return reinterpret_cast<const unsigned*>(x + token * row_stride + column);
  }
};

// A pair of activations, scaled.
template <typename T>
__device__ __forceinline__ unsigned scaled(unsigned pair, float2 factors) {
  const float2 v = unpack<T>(pair);
  return pack(Number<T>::narrow(v.x * factors.x), Number<T>::narrow(v.y * factors.y));
}

}  // namespace vptq
