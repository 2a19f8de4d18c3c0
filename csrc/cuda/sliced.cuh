// The codebook stays, the indices move: products with a book too large for shared memory.
//
// A block holds one slice of the book (8192 centroids) and the activations of a range of columns. At load time every
// vector row's indices were sorted into one list per slice and tile of columns; the order within a list is free, since
// a sum does not care. ldmatrix.trans of the centroids of 16 entries is the B fragment of an mma whose k runs over
// entries, and ldmatrix.trans of the activations of the same entries is its A fragment.
#pragma once

#include "inputs.cuh"

namespace vptq {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kSliceRows = 8192;
constexpr int kTileColumns = 2048;
constexpr int kSpanTiles = 2;                    // what a block holds of one octet of tokens
constexpr int kTileRows = kTileColumns + 8;      // in shared memory: the columns, and zeros for entries that only pad
constexpr int kRowBits = 13;

// An entry has its column at bit 19 (as a row of shared memory: within the span, tiles kTileRows apart) and its row of
// the slice at bit 2: addresses, a row being 16 bytes, are a shift away. In a group of 32, the row of entry i is in the
// word of lane lane_of_row(i): so the centroids of entries 0-7 and 16-23 arrive in neighbouring registers, as a B
// fragment must, and those of the others too.
__device__ __forceinline__ unsigned make_entry(int tile, int column_in_tile, unsigned slice_row) {
  return unsigned(tile % kSpanTiles * kTileRows + column_in_tile) << 19 | slice_row << 2;
}
__device__ __forceinline__ int lane_of_row(int i) { return i & ~24 | (i & 8) << 1 | (i & 16) >> 1; }
__device__ __forceinline__ unsigned join_entry(unsigned column_of, unsigned row_of) {
  return (column_of & ~0u << 19) | (row_of & ~(~0u << 19));
}
__device__ __forceinline__ int entry_column(unsigned entry, int span) {
  const int row = entry >> 19;
  return span * kSpanTiles * kTileColumns + (row < kTileRows ? row : row - kTileRows + kTileColumns);
}
__device__ __forceinline__ bool entry_pads(unsigned entry) { return (entry >> 19) % kTileRows == kTileColumns; }
__device__ __forceinline__ unsigned entry_slice_row(unsigned entry) { return entry >> 2 & (kSliceRows - 1); }

// The slice in shared memory: filled by the copy engine where there is one, once for neighbouring jobs of a block.
struct SliceCopy {
  uint64_t barrier;
  int held, phase;

  __device__ void initialise() {
    held = -1;
    phase = 1;
    initialise_barrier(shared_address(&barrier), 1);
  }
  // By one thread. Everybody may have been reading the slice before, but no longer.
  __device__ void begin(uint4* slice, const uint4* book, const Job& job) {
    if (held == job.book) return;
    held = job.book;
    phase ^= 1;
    begin_bulk_copy(shared_address(slice), book, job.book_rows * 16, shared_address(&barrier));
  }
  __device__ void wait() { wait_for_phase(shared_address(&barrier), phase); }
};

template <typename T, int Octets>  // of tokens
__device__ __noinline__ void multiply_sliced(const Layer& layer, const Tokens& tokens, const Job& job, SliceCopy& copy,
                                             float* workspace, int64_t stride, uint4* shared) {
  constexpr int kTiles = kSpanTiles / Octets;
  constexpr int kPlaneRows = kTiles * kTileRows;
  constexpr int kRing = 2, kAhead = 10;  // blocks on their way to a warp, and groups of 32 entries in each at most
  constexpr int kBatch = 2;              // groups looked up together
  constexpr int kChains = Octets == 1 ? kBatch : 1;  // of dependent products
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4* tile = shared + kSliceRows;
  const uint4* book = static_cast<const uint4*>(layer.books) + job.book;
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) copy.begin(shared, book, job);
#else
  for (int i = threadIdx.x; i < job.book_rows; i += kThreads) copy_async16(shared_address(shared + i), book + i);
#endif

  const int first_tile = job.column_begin / kTileColumns;
  const int last_tile = (job.column_end + kTileColumns - 1) / kTileColumns;
  const int* lists = layer.codes + job.lists;
  const unsigned* entries = reinterpret_cast<const unsigned*>(layer.codes) + job.codes + lane;
  auto bounds = [&](int row, int& begin, int& end) {
    begin = end = 0;
    if (row < job.row_end) {
      begin = __ldg(lists + row * job.list_tiles + first_tile);
      end = __ldg(lists + row * job.list_tiles + last_tile);
    }
  };
  // The lists of this warp's rows are read in blocks, kRing at a time. Those of a list are of equal size, since a short
  // one at its end would leave little to do while the next list is on its way. ends[i]: the row that ends with block i.
  const unsigned nothing = make_entry(first_tile, kTileColumns, 0);
  unsigned blocks[kRing][kAhead];
  int sizes[kRing], ends[kRing];
  int row = job.row_begin + warp, at, end, size, next_at, next_end;
  auto divide = [&] {
    const int count = max(1, (end - at + kAhead - 1) / kAhead);
    size = (end - at + count - 1) / count;
  };
  auto fetch = [&](int i) {
    const unsigned* from = entries + size_t(at) * 32;
    sizes[i] = min(size, end - at);
    unrolled<kAhead>([&](auto k) {
      blocks[i][k] = nothing;
      if (k < sizes[i]) blocks[i][k] = load_once<k * 32>(from);
    });
    at += sizes[i];
    ends[i] = -1;
    if (at == end) {
      ends[i] = row;
      row += kWarps;
      at = next_at;
      end = next_end;
      divide();
      bounds(row + kWarps, next_at, next_end);  // not looked at before this list has been read
    }
  };
  bounds(row, at, end);
  bounds(row + kWarps, next_at, next_end);
  divide();
#pragma unroll
  for (int i = 0; i < kRing; i++) fetch(i);

  wait_for_previous();
  const Inputs<T> inputs(layer, tokens, job, 8 * Octets);
  auto store_pairs = [&](int octet, int pair, const unsigned (&v)[8]) {
    uint4* to = tile + octet * kPlaneRows + 2 * pair + 2 * pair / kTileColumns * 8;
    to[0] = make_uint4(__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[2], v[3], 0x5410),
                       __byte_perm(v[4], v[5], 0x5410), __byte_perm(v[6], v[7], 0x5410));
    to[1] = make_uint4(__byte_perm(v[0], v[1], 0x7632), __byte_perm(v[2], v[3], 0x7632),
                       __byte_perm(v[4], v[5], 0x7632), __byte_perm(v[6], v[7], 0x7632));
  };
  const int pairs = (job.column_end - job.column_begin + 1) / 2;
  if (inputs.plain) {
    constexpr int kPairs = kTiles * kTileColumns / 2 / kThreads;  // of columns, per thread: all loads before all stores
    unsigned v[kPairs * Octets][8];
#pragma unroll
    for (int i = 0; i < kPairs * Octets; i++) {
      const int pair = threadIdx.x + i % kPairs * kThreads;
      const unsigned* from = inputs.plain_pairs(i / kPairs * 8, job.column_begin + 2 * pair);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        v[i][j] = 0;
        if (pair < pairs && i / kPairs * 8 + j < tokens.count) v[i][j] = __ldg(from + j * (tokens.row_stride / 2));
      }
    }
#pragma unroll
    for (int i = 0; i < kPairs * Octets; i++) store_pairs(i / kPairs, threadIdx.x + i % kPairs * kThreads, v[i]);
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < pairs * Octets; i += kThreads) {
      const int octet = i / pairs, pair = i % pairs;
      unsigned v[8];
#pragma unroll
      for (int j = 0; j < 8; j++)
        v[j] = inputs.pair(octet * 8 + j, job.column_begin + 2 * pair, job.column_end);
      store_pairs(octet, pair, v);
    }
  }
  if (threadIdx.x < kTiles * Octets)
    tile[threadIdx.x * kTileRows + kTileColumns] = make_uint4(0, 0, 0, 0);
#if __CUDA_ARCH__ < 900
  copy_async_commit();
  copy_async_wait<0>();
#endif
  __syncthreads();
  copy.wait();

  const uint32_t book_base = shared_address(shared);
  const uint32_t tile_base = shared_address(tile) - first_tile % kSpanTiles * kTileRows * 16;
  // One ldmatrix reads the activations of 32 entries, and its four registers are an A fragment whose upper rows belong
  // to entries 8-15 and 24-31, its lower ones to the others. Two products with the centroids of either set have what
  // is wanted in one half of the rows each; the other halves are never looked at. (See lane_of_row.)
  float sums[kChains][Octets][2][4] = {};
  auto multiply_block = [&](int i) {
#pragma unroll
    for (int first = 0; first < kAhead; first += kBatch) {
      if (first >= sizes[i]) return;
      unsigned centroids[kBatch][4], acts[kBatch][Octets][4];
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const unsigned entry = blocks[i][first + k];
        ldmatrix_trans(centroids[k], book_base + (entry & (kSliceRows - 1) << 2) * 4);
#pragma unroll
        for (int o = 0; o < Octets; o++)
          ldmatrix_trans(acts[k][o], tile_base + (entry >> 15) + o * kPlaneRows * 16);
      }
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
#pragma unroll
        for (int o = 0; o < Octets; o++) {
          const auto& a = acts[k][o];
          const auto& c = centroids[k];
          mma<T>(sums[k % kChains][o][0], a[0], a[1], a[2], a[3], c[0], c[1]);
          mma<T>(sums[k % kChains][o][1], a[0], a[1], a[2], a[3], c[2], c[3]);
        }
      }
    }
  };
  auto store_row = [&](int done) {
    const int group = lane / 4, output = job.out + done * 8 + lane % 4 * 2;
#pragma unroll
    for (int o = 0; o < Octets; o++) {
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll
      for (int k = 0; k < kChains; k++) {
        sum.x += sums[k][o][0][0] + sums[k][o][1][2];
        sum.y += sums[k][o][0][1] + sums[k][o][1][3];
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int r = 0; r < 4; r++) sums[k][o][h][r] = 0.f;
      }
      if (Octets == 1 && inputs.half) {
        sum.x += __shfl_down_sync(kAllLanes, sum.x, 16);
        sum.y += __shfl_down_sync(kAllLanes, sum.y, 16);
      }
      const int token = o * 8 + group;
      const bool kept = token < tokens.count && !(inputs.half && token >= inputs.half);
      if (kept) *reinterpret_cast<float2*>(workspace + token * stride + output) = sum;
    }
  };
  for (int left = (job.row_end - job.row_begin - warp + kWarps - 1) / kWarps; left > 0;) {
#pragma unroll
    for (int i = 0; i < kRing; i++) {
      multiply_block(i);
      const int done = ends[i];
      fetch(i);
      if (done < 0) continue;
      store_row(done);
      if (--left == 0) return;
    }
  }
}

}  // namespace vptq
