// Products of one token with a book too large for shared memory.
//
// As in sliced.cuh a block holds a slice of the book; but a tensor core would be fed eight tokens, and looking those up
// costs as much as the centroids. Here a lane has an entry, gets its centroid and the activation of its column, as fp32,
// and multiplies; the lanes' sums are added at the end of a list.
#pragma once

#include "lists.cuh"

namespace vptq {

template <typename T>
__device__ __noinline__ void multiply_single(const Layer& layer, const Tokens& tokens, const Job& job, SliceCopy& copy,
                                             float* workspace, uint4* shared) {
  constexpr int kRing = 2, kAhead = 9;
  constexpr int kBatch = 3;  // entries of a lane looked up together
  const int lane = threadIdx.x % 32;
  float* columns = reinterpret_cast<float*>(shared + kSliceRows);  // [kSpanTiles][kTileRows]
  if (threadIdx.x == 0) copy.begin(shared, static_cast<const uint4*>(layer.books) + job.book, job);
  ListReader<kRing, kAhead> reader(layer, job);

  wait_for_previous();
  const Inputs<T> inputs(layer, tokens, job, 0);
  constexpr int kShare = kSpanTiles * kTileColumns / kThreads;
  float mine[kShare];
  if (inputs.list) {
#pragma unroll
    for (int i = 0; i < kShare; i++) {
      const int column = job.column_begin + threadIdx.x + i * kThreads;
      mine[i] = column < job.column_end ? inputs.unrounded(0, column) : 0.f;
    }
  } else {
    T values[kShare];
    float factors[kShare];
#pragma unroll
    for (int i = 0; i < kShare; i++) {  // all loads before anything is done with one
      const int column = min(job.column_begin + int(threadIdx.x) + i * kThreads, job.column_end - 1);
      values[i] = inputs.x[column];
      factors[i] = inputs.scale ? __ldg(inputs.scale + column) : 1.f;
    }
#pragma unroll
    for (int i = 0; i < kShare; i++) mine[i] = Number<T>::wide(values[i]) * factors[i];
  }
#pragma unroll
  for (int i = 0; i < kShare; i++) {  // those behind the end are in no list
    const int column = threadIdx.x + i * kThreads;
    columns[column + column / kTileColumns * 8] = mine[i];
  }
  if (threadIdx.x < kSpanTiles)  // what entries that only pad are multiplied by
    columns[threadIdx.x * kTileRows + kTileColumns] = 0.f;
  __syncthreads();
  copy.wait();

  const uint32_t book = shared_address(shared);
  const uint32_t base = shared_address(columns) - job.column_begin / kTileColumns % kSpanTiles * kTileRows * 4;
  float sums[8] = {};
  auto multiply_block = [&](int i) {
#pragma unroll
    for (int first = 0; first < kAhead; first += kBatch) {
      if (first >= reader.sizes[i]) return;
      uint4 centroids[kBatch];
      float acts[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const unsigned entry = reader.blocks[i][first + k];
        centroids[k] = load_shared16(book + (entry & (kSliceRows - 1) << 2) * 4);
        acts[k] = load_shared(base + (entry >> 19) * 4);
      }
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        // A word's column is that of one entry, its row that of another (see lists.cuh).
        const float x = __shfl_sync(kAllLanes, acts[k], lane_of_row(lane));
        const unsigned pairs[4] = {centroids[k].x, centroids[k].y, centroids[k].z, centroids[k].w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 v = unpack<T>(pairs[e]);
          sums[2 * e] += x * v.x;
          sums[2 * e + 1] += x * v.y;
        }
      }
    }
  };
  // Every step halves what a lane has and the lanes that have it: lane i ends with output i / 4.
  auto store_row = [&](int row) {
#pragma unroll
    for (int half = 4; half; half /= 2) {
      const bool upper = lane & half * 4;
#pragma unroll
      for (int e = 0; e < half; e++) {
        const float given = upper ? sums[e] : sums[e + half];
        sums[e] = (upper ? sums[e + half] : sums[e]) + __shfl_xor_sync(kAllLanes, given, half * 4);
      }
    }
    sums[0] += __shfl_xor_sync(kAllLanes, sums[0], 2);
    sums[0] += __shfl_xor_sync(kAllLanes, sums[0], 1);
    if (lane % 4 == 0) workspace[job.out + row * 8 + lane / 4] = sums[0];
#pragma unroll
    for (int e = 0; e < 8; e++) sums[e] = 0.f;
  };
  reader.walk(job, multiply_block, store_row);
}

}  // namespace vptq
