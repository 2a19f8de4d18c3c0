// The codebook stays, the indices move: products of up to 16 tokens with a book too large for shared memory.
//
// A block holds one slice of the book and the activations of a range of columns. ldmatrix.trans of the centroids of 16
// entries of a list is the B fragment of an mma whose k runs over entries, and ldmatrix.trans of the activations of the
// same entries is its A fragment.
#pragma once

#include "lists.cuh"

namespace vptq {

template <typename T, int Octets, int Planes>  // of tokens; of vectors
__device__ __noinline__ void multiply_sliced(const Layer& layer, const Tokens& tokens, const Job& job, SliceCopy& copy,
                                             Dots& dots, float* workspace, int64_t stride, uint4* shared) {
  constexpr int kTiles = kSpanTiles / Octets;
  constexpr int kOctetRows = kTiles * kTileRows;         // of an octet
  constexpr int kPlaneBytes = kSliceRows / Planes * 16;  // of the slice
  constexpr int kRing = 2, kAhead = 10;  // blocks on their way to a warp, and groups of 32 entries in each at most
  constexpr int kBatch = 2;              // groups looked up together
  constexpr int kChains = Octets == 1 ? kBatch : 1;  // of dependent products
  const int lane = threadIdx.x % 32;
  uint4* tile = shared + kSliceRows;
  if (threadIdx.x == 0) copy.begin<Planes>(shared, layer.books, job);

  const int first_tile = job.column_begin / kTileColumns;
  ListReader<kRing, kAhead> reader(layer, job);

  const int pairs = (job.column_end - job.column_begin + 1) / 2;
  constexpr int kPairs = kTiles * kTileColumns / 2 / kThreads;  // of columns, per thread
  const bool has_scale = Octets == 1 && job.scale >= 0;
  const bool has_dot = Octets == 1 && job.dot >= 0 && job.row_begin == 0, has_shift = has_dot && job.shift >= 0;
  float2 factors[kPairs], shifts[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    const int column = job.column_begin + 2 * min(int(threadIdx.x) + i * kThreads, pairs - 1);
    factors[i] = shifts[i] = make_float2(1.f, 1.f);
    if (has_scale) factors[i] = load_ahead(reinterpret_cast<const float2*>(layer.norm + job.scale + column));
    if (has_shift) shifts[i] = load_ahead(reinterpret_cast<const float2*>(layer.norm + job.shift + column));
  }
  wait_for_previous();
  unsigned v[kPairs * Octets][8];  // all loads before all stores
#pragma unroll
  for (int i = 0; i < kPairs * Octets; i++) {
    const int pair = threadIdx.x + i % kPairs * kThreads;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int token = i / kPairs * 8 + j;
      const T* from = static_cast<const T*>(tokens.x) + token * tokens.row_stride + job.column_begin;
      v[i][j] = 0;
      if (pair < pairs && token < tokens.count) v[i][j] = __ldg(reinterpret_cast<const unsigned*>(from) + pair);
    }
  }
  if (has_dot) {
    float own[8] = {};
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float2 pair = unpack<T>(v[i][j]);
        own[j] += pair.x * shifts[i].x + pair.y * shifts[i].y;
      }
    }
    dots.add(own);
  }
#pragma unroll
  for (int i = 0; i < kPairs * Octets; i++) {
    if (has_scale) {
#pragma unroll
      for (int j = 0; j < 8; j++) v[i][j] = scaled<T>(v[i][j], factors[i % kPairs]);
    }
    const int pair = threadIdx.x + i % kPairs * kThreads;
    uint4* to = tile + i / kPairs * kOctetRows + 2 * pair + 2 * pair / kTileColumns * 8;
    const auto& w = v[i];
    to[0] = make_uint4(__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[2], w[3], 0x5410),
                       __byte_perm(w[4], w[5], 0x5410), __byte_perm(w[6], w[7], 0x5410));
    to[1] = make_uint4(__byte_perm(w[0], w[1], 0x7632), __byte_perm(w[2], w[3], 0x7632),
                       __byte_perm(w[4], w[5], 0x7632), __byte_perm(w[6], w[7], 0x7632));
  }
  if (threadIdx.x < kTiles * Octets) tile[threadIdx.x * kTileRows + kTileColumns] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  if (has_dot) dots.store(workspace + job.dot, stride, tokens.count);
  copy.wait();

  const uint32_t book_base = shared_address(shared);
  const uint32_t tile_base = shared_address(tile) - first_tile % kSpanTiles * kTileRows * 16;
  // One ldmatrix reads the activations of 32 entries, and its four registers are an A fragment whose upper rows belong
  // to entries 8-15 and 24-31, its lower ones to the others. Two products with the centroids of either set have what
  // is wanted in one half of the rows each; the other halves are never looked at. (See lane_of_row.)
  float sums[kChains][Octets][Planes][2][4] = {};
  auto multiply_block = [&](int i) {
#pragma unroll
    for (int first = 0; first < kAhead; first += kBatch) {
      if (first >= reader.sizes[i]) return;
      unsigned centroids[kBatch][Planes][4], acts[kBatch][Octets][4];
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const unsigned entry = reader.blocks[i][first + k];
#pragma unroll
        for (int p = 0; p < Planes; p++)
          ldmatrix_trans(centroids[k][p], book_base + (entry & (kSliceRows - 1) << 2) * 4 + p * kPlaneBytes);
#pragma unroll
        for (int o = 0; o < Octets; o++) ldmatrix_trans(acts[k][o], tile_base + (entry >> 15) + o * kOctetRows * 16);
      }
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
#pragma unroll
        for (int o = 0; o < Octets; o++) {
          const auto& a = acts[k][o];
#pragma unroll
          for (int p = 0; p < Planes; p++) {
            const auto& c = centroids[k][p];
            mma<T>(sums[k % kChains][o][p][0], a[0], a[1], a[2], a[3], c[0], c[1]);
            mma<T>(sums[k % kChains][o][p][1], a[0], a[1], a[2], a[3], c[2], c[3]);
          }
        }
      }
    }
  };
  auto store_row = [&](int done) {
    const int output = job.out + done * 8 * Planes + lane % 4 * 2;
#pragma unroll
    for (int o = 0; o < Octets; o++) {
      const int token = o * 8 + lane / 4;
#pragma unroll
      for (int p = 0; p < Planes; p++) {
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll
        for (int k = 0; k < kChains; k++) {
          auto& own = sums[k][o][p];
          sum.x += own[0][0] + own[1][2];
          sum.y += own[0][1] + own[1][3];
#pragma unroll
          for (int h = 0; h < 2; h++)
#pragma unroll
            for (int r = 0; r < 4; r++) own[h][r] = 0.f;
        }
        if (token < tokens.count) *reinterpret_cast<float2*>(workspace + token * stride + output + p * 8) = sum;
      }
    }
  };
  reader.walk(job, multiply_block, store_row);
}

}  // namespace vptq
