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
  // Meaningful if there are such. (Flags rather than null: for `if (pointer)` after a choice between null and an
  // offset, ptxas 13.0 let the comparison read the register before the zero was in it, and lists were read that are not
  // there.)
  const float* scale;
  const int32_t* list;
  bool has_scale, has_list;
  int half;     // slots of a pair (high, low) are this far apart; 0 if numbers are rounded to T instead
  bool paired;  // pairs of columns are aligned pairs in memory
  bool plain;   // and nothing need be done to them

  // `slots` is how many numbers a kernel holds for each column.
  __device__ Inputs(const Layer& layer, const Tokens& tokens, const Job& job, int slots)
      : x(static_cast<const T*>(tokens.x)),
        row_stride(tokens.row_stride),
        count(tokens.count),
        scale(layer.norm + job.scale),
        list(layer.columns + job.column_list),
        has_scale(job.scale >= 0),
        has_list(job.column_list >= 0),
        half(has_scale && 2 * tokens.count <= slots ? slots / 2 : 0),
        paired(!has_list && tokens.row_stride % 2 == 0 && job.column_end % 2 == 0),
        plain(paired && !has_scale) {}

  // Which token, if there are as many, a slot holds.
  __device__ __forceinline__ int token(int slot) const { return half && slot >= half ? slot - half : slot; }

  // What slot `slot` holds for a column of the segment.
  __device__ __forceinline__ T operator()(int slot, int column) const {
    const int token = this->token(slot);
    if (token >= count) return Number<T>::narrow(0.f);
    if (!has_scale) return x[token * row_stride + (has_list ? __ldg(list + column) : column)];
    const float exact = unrounded(token, column);
    const T high = Number<T>::narrow(exact);
    return half && slot >= half ? Number<T>::narrow(exact - Number<T>::wide(high)) : high;
  }

  // A token's activation for a column of the segment, scaled.
  __device__ __forceinline__ float unrounded(int token, int column) const {
    const int source = has_list ? __ldg(list + column) : column;
    const float value = Number<T>::wide(x[token * row_stride + source]);
    return has_scale ? value * __ldg(scale + source) : value;
  }

  // Columns `column` (even) and `column + 1`, of which those at or beyond `end` count as zero.
  __device__ unsigned pair(int slot, int column, int end) const {
    const T zero = Number<T>::narrow(0.f);
    const T low = column < end ? (*this)(slot, column) : zero;
    return pack(low, column + 1 < end ? (*this)(slot, column + 1) : zero);
  }

  // As they are in memory, where `paired`, for columns before the end.
  __device__ __forceinline__ const unsigned* pairs(int token, int column) const {
    return reinterpret_cast<const unsigned*>(x + token * row_stride + column);
  }

  // What a slot holds of such a pair, given its scales.
  __device__ __forceinline__ unsigned scaled(int slot, unsigned pair, float2 factors) const {
    const float2 v = unpack<T>(pair);
    const float first = v.x * factors.x, second = v.y * factors.y;
    const T high[2] = {Number<T>::narrow(first), Number<T>::narrow(second)};
    if (!half || slot < half) return pack(high[0], high[1]);
    return pack(Number<T>::narrow(first - Number<T>::wide(high[0])),
                Number<T>::narrow(second - Number<T>::wide(high[1])));
  }
};

}  // namespace vptq
