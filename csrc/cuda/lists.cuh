// The lists of a book too large for shared memory, and how a warp reads them.
//
// At load time every vector row's indices were sorted into one list per slice of the book and tile of columns
// (pack_sliced.cu); the order within a list is free, since a sum does not care. A slice is 8192 rows of 16 bytes: as
// many centroids of up to 8 elements, or half as many of two planes, one behind the other.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace vptq {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kSliceRows = 8192;
constexpr int kTileColumns = 2048;
constexpr int kSpanTiles = 2;                // what a block holds of one octet of tokens
constexpr int kTileRows = kTileColumns + 8;  // in shared memory: the columns, and zeros for entries that only pad

// An entry has its column at bit 19 (as a row of shared memory: within the span, tiles kTileRows apart) and its row of
// the slice (of its first plane) at bit 2: addresses, a row being 16 bytes, are a shift away. In a group of 32, the row
// of entry i is in the word of lane lane_of_row(i): so the centroids of entries 0-7 and 16-23 arrive in neighbouring
// registers, as a B fragment must, and those of the others too.
__device__ __forceinline__ unsigned make_entry(int tile, int column_in_tile, unsigned slice_row) {
  return unsigned(tile % kSpanTiles * kTileRows + column_in_tile) << 19 | slice_row << 2;
}
__device__ __forceinline__ int lane_of_row(int i) { return i & ~24 | (i & 8) << 1 | (i & 16) >> 1; }
__device__ __forceinline__ unsigned join_entry(unsigned column_of, unsigned row_of) {
  return (column_of & ~0u << 19) | (row_of & ~(~0u << 19));
}

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
  template <int Planes>
  __device__ void begin(uint4* slice, const void* books, const Job& job) {
    if (held == job.book) return;
    held = job.book;
    phase ^= 1;
    const uint32_t bytes = job.book_rows * 16;
    announce_bulk_copy(shared_address(&barrier), Planes * bytes);
    constexpr uint32_t kPiece = 16384;  // several at once keep more of the memory busy
    for (int plane = 0; plane < Planes; plane++) {
      const char* from = static_cast<const char*>(books) + size_t(plane ? job.res_book : job.book) * 16;
      const uint32_t to = shared_address(slice) + plane * (kSliceRows / Planes) * 16;
      for (uint32_t at = 0; at < bytes; at += kPiece)
        bulk_copy(to + at, from + at, min(kPiece, bytes - at), shared_address(&barrier));
    }
  }
  __device__ void wait() { wait_for_phase(shared_address(&barrier), phase); }
};

// A norm's dot products, one a token, which a job computes along with its own sums: what threads have of them is added
// up by every warp, and after a __syncthreads by one thread each.
struct Dots {
  float parts[kWarps][8];

  template <int N>
  __device__ __forceinline__ void add(float (&own)[N]) {
#pragma unroll
    for (int t = 0; t < N; t++) {
#pragma unroll
      for (int o = 16; o; o /= 2) own[t] += __shfl_xor_sync(kAllLanes, own[t], o);
      if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][t] = own[t];
    }
  }
  __device__ __forceinline__ void store(float* to, int64_t stride, int count) const {
    if (int(threadIdx.x) >= count) return;
    float total = 0.f;
    for (int w = 0; w < kWarps; w++) total += parts[w][threadIdx.x];
    to[threadIdx.x * stride] = total;
  }
};

// A part of a list: groups of 32 entries, and the row that ends with it, or -1.
struct ListPart {
  int at, size, ends;
};

// The lists of this warp's rows, every kWarps-th of the job, in parts of at most kMost groups, all but the last of a
// list multiples of kGrain. Two are about equal, since a short one would leave little to do while the next list is on
// its way.
template <int kMost, int kGrain = 1>
class ListParts {
  static_assert(kMost % kGrain == 0);

 public:
  __device__ __forceinline__ ListParts(const Layer& layer, const Job& job)
      : layer_(layer), job_(job), row_(job.row_begin + threadIdx.x / 32), nth_(0) {
    find();
    begin();
  }

  // Empty ones after the last.
  __device__ __forceinline__ ListPart next() {
    ListPart part{at_, min(size_, end_ - at_), -1};
    at_ += part.size;
    if (at_ == end_) {
      part.ends = row_;
      row_ += kWarps;
      if (++nth_ % 32 == 0) find();
      begin();
    }
    return part;
  }

 private:
  const Layer& layer_;
  const Job& job_;
  int row_, nth_;      // of the present list, and how many there were before
  int begins_, ends_;  // each lane's are of one of 32 lists, among them the present one
  int at_, end_, size_;

  __device__ __forceinline__ void find() {
    const int row = row_ + threadIdx.x % 32 * kWarps;
    begins_ = ends_ = 0;
    if (row < job_.row_end) {
      const int first_tile = job_.column_begin / kTileColumns;
      const int tiles = (job_.column_end + kTileColumns - 1) / kTileColumns - first_tile;
      const int* bounds = layer_.codes + job_.lists + row * job_.list_tiles + first_tile;
      begins_ = __ldg(bounds);
      ends_ = __ldg(bounds + tiles);
    }
  }
  __device__ __forceinline__ void begin() {
    at_ = __shfl_sync(kAllLanes, begins_, nth_ % 32);
    end_ = __shfl_sync(kAllLanes, ends_, nth_ % 32);
    size_ = end_ - at_;
    if (size_ > kMost) size_ = size_ > 2 * kMost ? kMost : (size_ + 2 * kGrain - 1) / (2 * kGrain) * kGrain;
  }
};

// Parts of lists on their way to registers, kRing of them.
template <int kRing, int kAhead, int kGrain = 1>
class ListReader {
 public:
  unsigned blocks[kRing][kAhead];  // this lane's words; beyond the size, entries that only pad
  int sizes[kRing], ends[kRing];   // see ListPart

  __device__ __forceinline__ ListReader(const Layer& layer, const Job& job)
      : parts_(layer, job),
        nothing_(make_entry(job.column_begin / kTileColumns, kTileColumns, 0)),
        entries_(reinterpret_cast<const unsigned*>(layer.codes) + job.codes + threadIdx.x % 32) {
#pragma unroll
    for (int i = 0; i < kRing; i++) fetch(i);
  }

  // Calls multiply(i) for every block, whose place in the ring that is, and store(row) after the last of a list.
  template <typename Multiply, typename Store>
  __device__ __forceinline__ void walk(const Job& job, const Multiply& multiply, const Store& store) {
    for (int left = (job.row_end - job.row_begin - int(threadIdx.x / 32) + kWarps - 1) / kWarps; left > 0;) {
#pragma unroll
      for (int i = 0; i < kRing; i++) {
        multiply(i);
        const int done = ends[i];
        fetch(i);
        if (done < 0) continue;
        store(done);
        if (--left == 0) return;
      }
    }
  }

 private:
  ListParts<kAhead, kGrain> parts_;
  unsigned nothing_;
  const unsigned* entries_;

  // Block i of the ring, once that is used up.
  __device__ __forceinline__ void fetch(int i) {
    const ListPart part = parts_.next();
    const unsigned* from = entries_ + size_t(part.at) * 32;
    sizes[i] = part.size;
    ends[i] = part.ends;
    unrolled<kAhead>([&](auto k) {
      blocks[i][k] = nothing_;
      if (k < part.size) blocks[i][k] = load_once<k * 32>(from);
    });
  }
};

}  // namespace vptq
