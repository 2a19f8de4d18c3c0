// Checkpoint indices -> lists of the sliced layout (sliced.cuh), ordered so that shared memory has few bank conflicts.
//
// Eight consecutive entries are read at once, their centroids in one phase of ldmatrix and their activations in
// another. Rows of 16 bytes fall into 8 banks, by row % 8: a phase costs as many cycles as its fullest bank. So a
// list is a bipartite multigraph, centroid banks x column banks, and each phase should be a perfect matching of it.
// Phases are found one after another by augmenting paths, vertices with most entries left first; a bank with more
// entries than phases are left takes part twice, as early as possible and together with others of its kind.
#include "sliced.cuh"
#include "stream.cuh"

namespace vptq {
namespace {

constexpr int kPackWarps = 8;

__global__ void count_kernel(Stream stream, int slice_bits, int slices, int tiles, int32_t* counts) {
  extern __shared__ int count[];
  const int row = blockIdx.x, tile = blockIdx.y;
  for (int s = threadIdx.x; s < slices; s += blockDim.x) count[s] = 0;
  __syncthreads();
  const int end = min((tile + 1) * kTileColumns, stream.columns);
  for (int c = tile * kTileColumns + threadIdx.x; c < end; c += blockDim.x)
    atomicAdd(&count[stream_index(stream, row, c) >> slice_bits], 1);
  __syncthreads();
  for (int s = threadIdx.x; s < slices; s += blockDim.x)
    counts[(size_t(s) * stream.rows + row) * tiles + tile] = count[s];
}

// Banks that appear once, or twice where more entries are left than phases, fullest first.
struct Side {
  int bank[16];
  int size;

  __device__ void sort(const int* left, int phases) {
    int weight[16];
    size = 0;
    for (int bank_ = 0; bank_ < 8; bank_++) {
      const int excess = left[bank_] - phases;
      if (left[bank_] > 0) insert(weight, bank_, left[bank_]);
      if (excess > 0) insert(weight, bank_, (1 << 20) + excess);
    }
  }

  __device__ void insert(int* weight, int bank_, int w) {
    int at = size++;
    for (; at > 0 && weight[at - 1] < w; at--) {
      weight[at] = weight[at - 1];
      bank[at] = bank[at - 1];
    }
    weight[at] = w;
    bank[at] = bank_;
  }
};

// One list, by one thread: which (centroid bank, column bank) each entry in turn is taken from.
struct Schedule {
  int* cell;  // [8][8] entries left
  int left_a[8], left_b[8];
  int left;

  __device__ explicit Schedule(int* cells) : cell(cells), left(0) {
    for (int i = 0; i < 8; i++) left_a[i] = left_b[i] = 0;
    for (int i = 0; i < 64; i++) {
      left_a[i / 8] += cell[i];
      left_b[i % 8] += cell[i];
      left += cell[i];
    }
  }

  // The next up to eight cells, in `out`.
  __device__ int phase(int* out) {
    const int phases = (left + 7) / 8, wanted = min(left, 8);
    Side a, b;
    a.sort(left_a, phases);
    b.sort(left_b, phases);
    int match_a[16], match_b[16], found = 0;
    for (int i = 0; i < 16; i++) match_a[i] = match_b[i] = -1;
    for (int i = 0; i < a.size && found < wanted; i++) found += augment(i, a, b, match_a, match_b);
    int taken = 0;
    for (int j = 0; j < b.size; j++)
      if (match_b[j] >= 0) out[taken++] = a.bank[match_b[j]] * 8 + b.bank[j];
    // Where no matching is large enough, whatever adds the least to the fullest banks.
    while (taken < wanted) {
      int best = -1, best_cost = 1 << 30;
      for (int c = 0; c < 64; c++) {
        if (cell[c] == 0) continue;
        int same_a = 0, same_b = 0;
        for (int t = 0; t < taken; t++) {
          same_a += out[t] / 8 == c / 8;
          same_b += out[t] % 8 == c % 8;
        }
        const int cost = (same_a + same_b) * 4096 - left_a[c / 8] - left_b[c % 8];
        if (cost < best_cost) {
          best_cost = cost;
          best = c;
        }
      }
      cell[best]--;
      out[taken++] = best;
    }
    for (int t = 0; t < taken; t++) {
      left_a[out[t] / 8]--;
      left_b[out[t] % 8]--;
    }
    left -= taken;
    return taken;
  }

  // Breadth first from an unmatched vertex; a matched edge has its entry taken out of the cell.
  __device__ int augment(int start, const Side& a, const Side& b, int* match_a, int* match_b) {
    int queue[16], parent[16], tail = 1;
    unsigned seen = 0;
    queue[0] = start;
    for (int head = 0; head < tail; head++) {
      const int i = queue[head];
      for (int j = 0; j < b.size; j++) {
        if (seen >> j & 1 || cell[a.bank[i] * 8 + b.bank[j]] == 0) continue;
        seen |= 1u << j;
        parent[j] = i;
        if (match_b[j] >= 0) {
          queue[tail++] = match_b[j];
          continue;
        }
        for (int at = j; at >= 0;) {
          const int from = parent[at], before = match_a[from];
          cell[a.bank[from] * 8 + b.bank[at]]--;
          if (before >= 0) cell[a.bank[from] * 8 + b.bank[before]]++;
          match_a[from] = at;
          match_b[at] = from;
          at = before;
        }
        return 1;
      }
    }
    return 0;
  }
};

// A warp makes one list: entries sorted by cell, in column order within a cell, then taken as the schedule says.
__global__ void __launch_bounds__(kPackWarps * 32) lists_kernel(Stream stream, int slice_bits, int slices, int tiles,
                                                                const int32_t* __restrict__ offsets, int32_t* lists) {
  extern __shared__ unsigned sorted_[];
  __shared__ int cells_[kPackWarps][64], starts_[kPackWarps][64];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.x, tile = blockIdx.y;
  unsigned* sorted = sorted_ + warp * kTileColumns;
  int *cell = cells_[warp], *start = starts_[warp];
  const int first = tile * kTileColumns, end = min(first + kTileColumns, stream.columns);
  for (int slice = warp; slice < slices; slice += kPackWarps) {
    const size_t list = (size_t(slice) * stream.rows + row) * tiles + tile;
    const int begin = offsets[list], groups = offsets[list + 1] - begin;
    cell[lane] = cell[lane + 32] = 0;
    __syncwarp();
    for (int pass = 0; pass < 2; pass++) {
      for (int c = first + lane; c - lane < end; c += 32) {
        const unsigned index = c < end ? stream_index(stream, row, c) : ~0u;
        const bool ours = c < end && int(index >> slice_bits) == slice;
        const int key = ours ? int(index % 8 * 8 + c % 8) : -1;
        const unsigned same = __match_any_sync(kAllLanes, key);
        const int before = __popc(same & ((1u << lane) - 1));
        int base = 0;
        if (ours) base = cell[key];
        __syncwarp();
        if (ours && before == 0) cell[key] = base + __popc(same);
        if (ours && pass == 1)
          sorted[start[key] + base + before] = make_entry(tile, c - first, index & ((1u << slice_bits) - 1));
        __syncwarp();
      }
      if (pass == 0) {
        if (lane == 0)
          for (int i = 0, at = 0; i < 64; i++) {
            start[i] = at;
            at += cell[i];
          }
        __syncwarp();
        cell[lane] = cell[lane + 32] = 0;
        __syncwarp();
      }
    }
    unsigned* out = reinterpret_cast<unsigned*>(lists) + size_t(begin) * 32;
    if (lane == 0) {
      Schedule schedule(cell);
      int written = 0, next[8];
      while (schedule.left > 0) {
        const int count = schedule.phase(next);
        for (int i = 0; i < count; i++) out[written++] = sorted[start[next[i]]++];
      }
      for (; written < groups * 32; written++) out[written] = make_entry(tile, kTileColumns, 0);
    }
    __syncwarp();
    for (int g = 0; g < groups; g++) {
      const unsigned mine = out[g * 32 + lane];
      out[g * 32 + lane] = join_entry(mine, __shfl_sync(kAllLanes, mine, lane_of_row(lane)));
    }
    __syncwarp();
  }
}

}  // namespace

cudaError_t count_entries(const Stream& stream, int slice_bits, int slices, int tiles, int32_t* counts,
                          cudaStream_t cuda_stream) {
  count_kernel<<<dim3(stream.rows, tiles), 256, slices * sizeof(int), cuda_stream>>>(stream, slice_bits, slices, tiles,
                                                                                     counts);
  return cudaGetLastError();
}

cudaError_t fill_lists(const Stream& stream, int slice_bits, int slices, int tiles, const int32_t* offsets,
                       int32_t* lists, cudaStream_t cuda_stream) {
  const int shared = kPackWarps * kTileColumns * sizeof(unsigned);
  const cudaError_t error = cudaFuncSetAttribute(lists_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  lists_kernel<<<dim3(stream.rows, tiles), kPackWarps * 32, shared, cuda_stream>>>(stream, slice_bits, slices, tiles,
                                                                                   offsets, lists);
  return cudaGetLastError();
}

}  // namespace vptq
