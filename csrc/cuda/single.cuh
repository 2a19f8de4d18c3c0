// Products of one token with a book too large for shared memory.
//
// As in sliced.cuh a block holds a slice of the book, and ldmatrix.trans gathers the centroids of a group of 32
// entries: here they are the A fragment of an mma. Its B fragment has room for eight tokens, and looking those up would
// cost as much as the centroids. With one token, every lane looks up one number for each of four groups, and the
// numbers are exchanged among lanes so that all four groups' B fragments lie in the same registers: group j has columns
// j and j + 4 of B. What the products have in the other columns is the other groups' and never looked at.
#pragma once

#include "lists.cuh"

namespace vptq {

// How a lane takes part in the exchange: a number of each of four groups, for the entry of this lane in words[j],
// becomes the B fragments of the groups. An A fragment has entries 0-15 in its upper rows, 16-31 in the lower (see
// lane_of_row); lane bits: upper or lower, k / 8, and k % 8.
class Crossing {
 public:
  __device__ __forceinline__ explicit Crossing(int lane) {
    const bool odd = lane & 1, second = lane & 8;
    given_ = kept(odd ? 0x5410 : 0x7632);
    kept_ = kept(odd ? 0x7632 : 0x5410);
    const unsigned first_pair = odd ? 0x1054 : 0x5410, second_pair = odd ? 0x3276 : 0x7632;
    own_ = kept(second ? second_pair : first_pair);
    other_ = kept(second ? first_pair : second_pair);
    from_ = kept(lane & 24 | (lane & 3) << 1 | (lane & 4) >> 2);
    swapped_from_ = kept(from_ ^ 8);
    second_ = kept(second);
  }

  // Groups 0 and 1, 2 and 3, a number in each half.
  __device__ __forceinline__ void operator()(unsigned (&b)[2], unsigned groups01, unsigned groups23) const {
    // The lowest bit of k goes into the registers, that of the group into the lane.
    const unsigned given = __byte_perm(groups01, groups23, given_), mine = __byte_perm(groups01, groups23, kept_);
    const unsigned taken = __shfl_xor_sync(kAllLanes, given, 1);
    // Then k / 8 and the other bit of the group; and a lane's column is its number / 4.
    const unsigned same = __shfl_sync(kAllLanes, __byte_perm(mine, taken, own_), from_);
    const unsigned swapped = __shfl_sync(kAllLanes, __byte_perm(mine, taken, other_), swapped_from_);
    b[0] = second_ ? swapped : same;
    b[1] = second_ ? same : swapped;
  }

 private:
  unsigned given_, kept_, own_, other_, from_, swapped_from_, second_;

  // Left to itself the compiler computes them anew each time.
  static __device__ __forceinline__ unsigned kept(unsigned v) {
    asm volatile("" : "+r"(v));
    return v;
  }
};

template <typename T, int Planes>  // of vectors
__device__ __noinline__ void multiply_single(const Layer& layer, const Tokens& tokens, const Job& job, SliceCopy& copy,
                                             Dots& dots, float* workspace, uint4* shared) {
  constexpr int kBatch = 4;  // groups looked up together
  constexpr int kRing = 2, kAhead = 12;
  constexpr int kPlaneBytes = kSliceRows / Planes * 16;
  const int lane = threadIdx.x % 32;
  // Of every column the activation, [kSpanTiles][kTileRows], in four copies: entries 8 i .. of a group read copy i,
  // which lies in banks of its own. So they collide no more than those of sliced.cuh.
  uint4* columns = shared + kSliceRows;
  if (threadIdx.x == 0) copy.begin<Planes>(shared, layer.books, job);
  ListReader<kRing, kAhead, kBatch> reader(layer, job);

  constexpr int kShare = kSpanTiles * kTileColumns / kThreads;
  // Of columns behind the end, which are in no list, the last one's.
  auto column_of = [&](int i) { return min(job.column_begin + int(threadIdx.x) + i * kThreads, job.column_end - 1); };
  const bool has_dot = job.dot >= 0 && job.row_begin == 0, has_shift = has_dot && job.shift >= 0;
  float factors[kShare], shifts[kShare];
#pragma unroll
  for (int i = 0; i < kShare; i++) {
    factors[i] = job.scale >= 0 ? load_ahead(layer.norm + job.scale + column_of(i)) : 1.f;
    shifts[i] = has_shift ? load_ahead(layer.norm + job.shift + column_of(i)) : 1.f;
  }
  wait_for_previous();
  const T* x = static_cast<const T*>(tokens.x);
  T values[kShare];
#pragma unroll
  for (int i = 0; i < kShare; i++) values[i] = x[column_of(i)];  // all loads before anything is done with one
  if (has_dot) {
    float own[1] = {};
#pragma unroll
    for (int i = 0; i < kShare; i++) {
      const bool there = job.column_begin + int(threadIdx.x) + i * kThreads < job.column_end;
      own[0] += there ? Number<T>::wide(values[i]) * shifts[i] : 0.f;
    }
    dots.add(own);
  }
#pragma unroll
  for (int i = 0; i < kShare; i++) {
    const int column = threadIdx.x + i * kThreads;
    const T value = Number<T>::narrow(Number<T>::wide(values[i]) * factors[i]);
    const unsigned twice = pack(value, value);
    columns[column + column / kTileColumns * 8] = make_uint4(twice, twice, twice, twice);
  }
  if (threadIdx.x < kSpanTiles)  // what entries that only pad are multiplied by
    columns[threadIdx.x * kTileRows + kTileColumns] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  if (has_dot) dots.store(workspace + job.dot, 0, 1);
  copy.wait();

  const uint32_t book = shared_address(shared);
  const uint32_t base =
      shared_address(columns) - job.column_begin / kTileColumns % kSpanTiles * kTileRows * 16 + lane / 8 * 4;
  const Crossing cross(lane);
  float sums[Planes][kBatch][4] = {};
  auto multiply_block = [&](int i) {
#pragma unroll
    for (int first = 0; first < kAhead; first += kBatch) {
      if (first >= reader.sizes[i]) return;
      unsigned c[Planes][kBatch][4], x[kBatch], b[2];
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const unsigned entry = reader.blocks[i][first + k];
        x[k] = load_shared_word(base + (entry >> 15));
#pragma unroll
        for (int p = 0; p < Planes; p++)
          ldmatrix_trans(c[p][k], book + (entry & (kSliceRows - 1) << 2) * 4 + p * kPlaneBytes);
      }
      cross(b, __byte_perm(x[0], x[1], 0x5410), __byte_perm(x[2], x[3], 0x5410));
#pragma unroll
      for (int p = 0; p < Planes; p++)
#pragma unroll
        for (int k = 0; k < kBatch; k++) mma<T>(sums[p][k], c[p][k][0], c[p][k][1], c[p][k][2], c[p][k][3], b[0], b[1]);
    }
  };
  // Group j's sums: rows 0-7 of column j, and rows 8-15 of column j + 4.
  auto store_row = [&](int row) {
    const bool second = lane & 1, lower = lane & 2;
#pragma unroll
    for (int p = 0; p < Planes; p++) {
      auto& own = sums[p];
      float sum = 0.f;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float upper_sum = second ? own[2 + half][half] : own[half][half];
        const float lower_sum = second ? own[2 + half][2 + half] : own[half][2 + half];
        sum += lower ? lower_sum : upper_sum;
      }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (lane % 4 == 0) workspace[job.out + row * 8 * Planes + p * 8 + lane / 4] = sum;
#pragma unroll
      for (int k = 0; k < kBatch; k++)
#pragma unroll
        for (int r = 0; r < 4; r++) own[k][r] = 0.f;
    }
  };
  reader.walk(job, multiply_block, store_row);
}

}  // namespace vptq
