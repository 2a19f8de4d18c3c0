// Checkpoint indices -> codes of the resident kinds, in the order the lanes of resident.cuh load them.
#include "resident.cuh"
#include "stream.cuh"

namespace vptq {
namespace {

// Chooses an image of the book for each of the eight look-ups of a phase (a lane's neighbours): in turn, the image
// whose bank is least used, and again a few times now that the others have chosen.
__device__ int choose_image(int row, int images) {
  const int lane = threadIdx.x % 8;
  unsigned load = 0;  // 4 bits per bank
  int chosen = -1;
  for (int turn = 0; turn < 64; turn++) {
    int bank = -1, old = -1;
    if (turn % 8 == lane) {
      unsigned others = load;
      if (chosen >= 0) {
        old = image_row(row, chosen, 0) & 7;
        others -= 1u << (4 * old);
      }
      int best = 64;
      for (int i = 0; i < images; i++) {
        const int b = image_row(row, i, 0) & 7;
        // Among equals another one each time: that is how a chain of moves can free a bank.
        const int used = (others >> (4 * b) & 15) * 4 + (i + turn / 8) % images;
        if (used < best) {
          best = used;
          bank = b;
          chosen = i;
        }
      }
    }
    bank = __shfl_sync(kAllLanes, bank, turn % 8, 8);
    old = __shfl_sync(kAllLanes, old, turn % 8, 8);
    if (old >= 0) load -= 1u << (4 * old);
    load += 1u << (4 * bank);
  }
  return chosen;
}

template <Kind kKind>
__global__ void codes_kernel(Stream main, Stream residual, int loads, int book_rows, int copies, int width,
                             int32_t* codes) {
  constexpr int kSteps = steps_per_load(kKind);
  constexpr bool kPairs = kKind == Kind::kBytePairs;
  const int lane = threadIdx.x % 32, pair = blockIdx.x;
  const int row = width == 16 ? pair : 2 * pair + (lane >> 3 & 1);
  for (int l = threadIdx.x / 32; l < loads; l += blockDim.x / 32) {
    unsigned words[4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      const int column = (l * kSteps + s) * 16 + (width == 16 ? lane / 2 : lane % 8 + lane / 16 * 8);
      const bool inside = row < main.rows && column < main.columns;
      unsigned code = inside ? stream_index(main, row, column) : 0;
      const unsigned extra = kPairs && inside ? stream_index(residual, row, column) : 0;
      if (kKind == Kind::kShorts && copies) code = image_row(code, choose_image(code, copies), book_rows);
      if (kKind == Kind::kBytes) words[s / 4] |= code << (8 * (s % 4));
      if (kKind == Kind::kBytePairs) words[s / 2] |= (code | extra << 8) << (16 * (s % 2));
      if (kKind == Kind::kShorts) words[s / 2] |= code << (16 * (s % 2));
    }
    const size_t load = size_t(pair) * loads + l;
    if (width == 8 || lane % 2 == 0)
      reinterpret_cast<uint4*>(codes)[width == 16 ? load * 16 + lane / 2 : load * 32 + lane] =
          make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace

cudaError_t fill_codes(Kind kind, const Stream& main, const Stream& residual, int loads, int book_rows, int copies,
                       int width, int32_t* codes, cudaStream_t stream) {
  auto go = [&](auto kernel) {
    kernel<<<width == 16 ? main.rows : (main.rows + 1) / 2, 256, 0, stream>>>(main, residual, loads, book_rows, copies,
                                                                              width, codes);
    return cudaGetLastError();
  };
  switch (kind) {
    case Kind::kBytes:
      return go(codes_kernel<Kind::kBytes>);
    case Kind::kBytePairs:
      return go(codes_kernel<Kind::kBytePairs>);
    case Kind::kShorts:
    case Kind::kFar:
      return go(codes_kernel<Kind::kShorts>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace vptq
