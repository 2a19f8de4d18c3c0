// Where a kernel gets its activations: scaled by the norm of the columns, gathered through a column list, and, where
// there is room, as a sum of two 16-bit numbers, so that the scaled value is not rounded to 16 bits.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace vptq {

template <typename T>
struct Inputs {
  const T* x;
  int64_t row_stride;
  int count;
  const float* scale;    // or null
  const int32_t* list;   // or null
  int half;              // slots of a pair (high, low) are this far apart; 0 if numbers are rounded to T instead
  bool plain;            // pairs of columns are aligned pairs in memory

  // `slots` is how many numbers a kernel holds for each column.
  __device__ Inputs(const Layer& layer, const Tokens& tokens, const Job& job, int slots)
      : x(static_cast<const T*>(tokens.x)),
        row_stride(tokens.row_stride),
        count(tokens.count),
        scale(job.scale < 0 ? nullptr : layer.norm + job.scale),
        list(job.column_list < 0 ? nullptr : layer.columns + job.column_list),
        half(scale && 2 * tokens.count <= slots ? slots / 2 : 0),
        plain(!scale && !list && tokens.row_stride % 2 == 0 && job.column_end % 2 == 0) {}

  // What slot `slot` holds for a column of the segment.
  __device__ __forceinline__ T operator()(int slot, int column) const {
    const int token = half && slot >= half ? slot - half : slot;
    if (token >= count) return Number<T>::narrow(0.f);
    const int source = list ? __ldg(list + column) : column;
    const T value = x[token * row_stride + source];
    if (!scale) return value;
    const float exact = Number<T>::wide(value) * __ldg(scale + source);
    const T high = Number<T>::narrow(exact);
    return half && slot >= half ? Number<T>::narrow(exact - Number<T>::wide(high)) : high;
  }

  // Columns `column` (even) and `column + 1`, of which those at or beyond `end` count as zero.
  __device__ unsigned pair(int slot, int column, int end) const {
    const T zero = Number<T>::narrow(0.f);
    const T low = column < end ? (*this)(slot, column) : zero;
    return pack(low, column + 1 < end ? (*this)(slot, column + 1) : zero);
  }

  // The same where `plain`, for columns before the end.
  __device__ __forceinline__ const unsigned* plain_pairs(int slot, int column) const {
    return reinterpret_cast<const unsigned*>(x + slot * row_stride + column);
  }
};

}  // namespace vptq
