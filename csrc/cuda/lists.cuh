// The lists of a book too large for shared memory, and how a warp reads them.
//
// At load time every vector row's indices were sorted into one list per slice of the book (8192 centroids) and tile of
// columns (pack_sliced.cu); the order within a list is free, since a sum does not care.
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
__device__ __forceinline__ int entry_bank(unsigned entry) { return entry >> 19 & 31; }  // of fp32 activations
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

// The lists of this warp's rows (every kWarps-th of the job), read in blocks, kRing at a time. Those of a list are of
// equal size, since a short one at its end would leave little to do while the next list is on its way.
template <int kRing, int kAhead>  // blocks on their way, and groups of 32 entries in each at most
class ListReader {
 public:
  unsigned blocks[kRing][kAhead];  // this lane's words; beyond the size, entries that only pad
  int sizes[kRing], ends[kRing];   // groups of a block; the row that ends with it, or -1

  __device__ __forceinline__ ListReader(const Layer& layer, const Job& job)
      : row_end_(job.row_end), row_(job.row_begin + threadIdx.x / 32), step_(kWarps * job.list_tiles) {
    const int first_tile = job.column_begin / kTileColumns;
    tiles_ = (job.column_end + kTileColumns - 1) / kTileColumns - first_tile;
    nothing_ = make_entry(first_tile, kTileColumns, 0);
    bounds_ = layer.codes + job.lists + row_ * job.list_tiles + first_tile;
    entries_ = reinterpret_cast<const unsigned*>(layer.codes) + job.codes + threadIdx.x % 32;
    find(row_, at_, end_);
    find(row_ + kWarps, next_at_, next_end_);
    divide();
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

  // Block i of the ring, once that is used up.
  __device__ __forceinline__ void fetch(int i) {
    const unsigned* from = entries_ + size_t(at_) * 32;
    sizes[i] = min(size_, end_ - at_);
    unrolled<kAhead>([&](auto k) {
      blocks[i][k] = nothing_;
      if (k < sizes[i]) blocks[i][k] = load_once<k * 32>(from);
    });
    at_ += sizes[i];
    ends[i] = -1;
    if (at_ == end_) {
      ends[i] = row_;
      row_ += kWarps;
      at_ = next_at_;
      end_ = next_end_;
      divide();
      find(row_ + kWarps, next_at_, next_end_);  // not looked at before this list has been read
    }
  }

 private:
  int row_end_, row_, step_, tiles_;
  unsigned nothing_;
  const int* bounds_;  // of the next row's list
  const unsigned* entries_;
  int at_, end_, size_, next_at_, next_end_;

  __device__ __forceinline__ void find(int row, int& begin, int& end) {
    begin = end = 0;
    if (row < row_end_) {
      begin = __ldg(bounds_);
      end = __ldg(bounds_ + tiles_);
    }
    bounds_ += step_;
  }
  __device__ __forceinline__ void divide() {
    size_ = end_ - at_;
    if (size_ <= kAhead) return;
    if (size_ <= 2 * kAhead) {  // most lists; and a division takes long
      size_ = (size_ + 1) / 2;
      return;
    }
    const int count = (size_ + kAhead - 1) / kAhead;
    size_ = (size_ + count - 1) / count;
  }
};

}  // namespace vptq
