// Books that fit shared memory, columns in order, activations in registers.
//
// All warps of a block walk over the same pairs of vector rows, each over columns of its own, whose activations it
// keeps in registers as B fragments. One ldmatrix.trans looks up 2 vector rows x 16 columns and is an A fragment.
// So shared memory, whose bandwidth is the limit, serves look-ups and nothing else. Bank conflicts are avoided by
// several images of the book: eight for a book of 256 entries, one for each of the eight rows that are read together;
// two or three of a larger one, of which the packing chose one per look-up (csrc/cuda/pack.cu).
#pragma once

#include "lists.cuh"

namespace vptq {

// Look-ups of a lane per 16-byte load of codes.
__host__ __device__ constexpr int steps_per_load(Kind kind) { return kind == Kind::kBytes ? 16 : 8; }

constexpr int kStepsPerWarp = 16;  // steps of 16 columns, whose activations a warp holds: bounded by registers

// Sums of the warps are added through two buffers, each of a row pair. A warp adds up its share of a row only when it
// has computed the next, by when the others have stored the first: nobody waits for anybody.
__host__ __device__ constexpr int exchange_bytes(int octets) { return 2 * kWarps * 128 * 4 * octets; }

struct Exchange {
  uint64_t full[2];
  int rows;  // so far

  __device__ void initialise() {
    rows = 0;
    for (int i = 0; i < 2; i++) initialise_barrier(shared_address(full + i), kWarps);
  }
};

// What the eight entries around `row` exchange their banks by in one of up to three images: nothing in the first, and
// never alike, so that every entry lies in as many banks as there are images.
__host__ __device__ inline int bank_mask(int row, int image) {
  if (image == 0) return 0;
  const int first = 1 + ((row >> 3 & 7) * 7 >> 3);   // 1 to 7
  const int second = 1 + ((row >> 6 & 7) * 6 >> 3);  // 1 to 6 for the six that are left
  return image == 1 ? first : second + (second >= first);
}

// Row of shared memory of entry `row` in image `image`.
__host__ __device__ inline int image_row(int row, int image, int rows) {
  return image * ((rows + 7) & ~7) + (row ^ bank_mask(row, image));
}

// The inverse: which entry lies in a row of the images; `rows` is a multiple of 8.
__device__ __forceinline__ int entry_of_image_row(int at, int rows) {
  const int image = (at >= rows) + (at >= 2 * rows), row = at - image * rows;
  return row ^ bank_mask(row, image);
}

// Every row is loaded once and stored to all images; blocks begin at different rows, since all load the same few lines
// of the L2 cache at once.
template <bool Bytes>
__device__ __forceinline__ void fill_images(uint4* shared, const uint4* book, int rows, int images) {
  const int first = blockIdx.x * 61 % rows;
#pragma unroll 8
  for (int i = threadIdx.x; i < rows; i += blockDim.x) {
    const int row = i + first < rows ? i + first : i + first - rows;
    const uint4 value = __ldg(book + row);
    for (int image = 0; image < images; image++)
      shared[Bytes ? row * 8 + (image + row) % 8 : image_row(row, image, rows)] = value;
  }
}

template <typename T, int Octets, Kind kKind>
__device__ __noinline__ void multiply_resident(const Layer& layer, const Tokens& tokens, const Job& job,
                                               Exchange& exchange, float* workspace, int64_t stride, uint4* shared) {
  constexpr bool kByteCodes = kKind != Kind::kShorts;
  constexpr bool kPairs = kKind == Kind::kBytePairs;
  constexpr int kSteps = steps_per_load(kKind);
  constexpr int kLoads = kStepsPerWarp / kSteps;
  constexpr int kAhead = Octets == 1 ? 3 : 1;  // row pairs whose codes are on their way
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  float* sums = reinterpret_cast<float*>(shared);
  uint4* images = shared + exchange_bytes(Octets) / 16;
  const int loads = (job.column_end - job.column_begin + kSteps * 16 - 1) / (kSteps * 16);
  const int warps = (loads + kLoads - 1) / kLoads;
  const int mine = min(max(loads - warp * kLoads, 0), kLoads);
  const int first_load = job.column_begin / (kSteps * 16) + warp * kLoads;
  const size_t row_loads = job.row_words / 4;
  const uint4* codes = reinterpret_cast<const uint4*>(layer.codes + job.codes) + size_t(first_load) * 32 + lane;
  uint4 ahead[kAhead][kLoads];
  auto load_codes = [&](uint4(&to)[kLoads], int row) {
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      to[l] = make_uint4(0, 0, 0, 0);
      if (l < mine && row < job.row_end) to[l] = load_once(codes + row * row_loads + l * 32);
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; i++) load_codes(ahead[i], job.row_begin + i);

  fill_images<kByteCodes>(images, static_cast<const uint4*>(layer.books) + job.book, job.book_rows, job.copies);
  const int image_rows = ((job.book_rows + 7) & ~7) * job.copies;
  if (kPairs)
    fill_images<kByteCodes>(images + image_rows, static_cast<const uint4*>(layer.books) + job.res_book, job.res_rows,
                            job.copies);

  wait_for_previous();
  unsigned acts[kLoads * kSteps][2 * Octets];
#pragma unroll
  for (int i = 0; i < 2 * Octets; i++) {
    const int slot = i / 2 * 8 + lane / 4, column = first_load * kSteps * 16 + lane % 4 * 2 + i % 2 * 8;
    const T* from = static_cast<const T*>(tokens.x) + slot * tokens.row_stride + column;
#pragma unroll
    for (int s = 0; s < kLoads * kSteps; s++) {
      const bool there = slot < tokens.count && s / kSteps < mine && column + s * 16 < job.column_end;
      acts[s][i] = 0;
      if (there) acts[s][i] = __ldg(reinterpret_cast<const unsigned*>(from + s * 16));
    }
  }
  __syncthreads();

  const uint32_t base = shared_address(images) + (kByteCodes ? lane % 8 * 16 : 0);
  const uint32_t res_base = base + image_rows * 16;
  constexpr int kBuffer = kWarps * 128 * Octets;
  const int row_count = exchange.rows - job.row_begin;  // of all jobs: the barriers' phases go on
  // Adds up a row pair. Four warps an octet do, others for the next.
  auto add_up = [&](int row) {
    const int count = row_count + row, octet = (warp / 4 + count * Octets) % 4;
    if (octet >= Octets) return;
    const float* buffer = sums + count % 2 * kBuffer + octet * kWarps * 128;
    const int at = threadIdx.x % 128, owner = at / 4, j = at % 4;
    const int token = octet * 8 + owner % 4 * 2 + j % 2;
    if (token >= tokens.count) return;
    float total = 0.f;
#pragma unroll 8
    for (int w = 0; w < warps; w++) total += buffer[w * 128 + at];
    const int vector_row = 2 * row + j / 2;
    workspace[token * stride + job.out + vector_row * 8 + owner / 4] = total;
  };
  auto wait_for_row = [&](int row) {
    const int count = row_count + row;
    wait_for_phase(shared_address(exchange.full + count % 2), count / 2 & 1);
  };
  for (int row = job.row_begin; row < job.row_end; row++) {
    uint4 now[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; l++) now[l] = ahead[0][l];
#pragma unroll
    for (int i = 0; i + 1 < kAhead; i++)
#pragma unroll
      for (int l = 0; l < kLoads; l++) ahead[i][l] = ahead[i + 1][l];
    load_codes(ahead[kAhead - 1], row + kAhead);

    float part[2][Octets][4] = {};
    if (mine) {
      constexpr int kBooks = kPairs ? 2 : 1, kLookups = kStepsPerWarp * kBooks, kDeep = 4;
      unsigned a[kDeep][4];
      auto look_up = [&](int i) {
        const int s = i / kBooks % kSteps;
        const uint4& load = now[i / kBooks / kSteps];
        const unsigned word = s * 4 / kSteps == 0   ? load.x
                              : s * 4 / kSteps == 1 ? load.y
                              : s * 4 / kSteps == 2 ? load.z
                                                    : load.w;
        if (kKind == Kind::kBytes)
          ldmatrix_trans(a[i % kDeep], base + (word >> (8 * (s % 4)) & 0xff) * 128);
        else if (kKind == Kind::kBytePairs)
          ldmatrix_trans(a[i % kDeep], (i % 2 ? res_base : base) + (word >> (16 * (s % 2) + 8 * (i % 2)) & 0xff) * 128);
        else
          ldmatrix_trans(a[i % kDeep], base + (word >> (16 * (s % 2)) & 0xffff) * 16);
      };
#pragma unroll
      for (int i = 0; i < kDeep; i++) look_up(i);
#pragma unroll
      for (int i = 0; i < kLookups; i++) {
        const auto& fragment = a[i % kDeep];
        const auto& columns = acts[i / kBooks];
#pragma unroll
        for (int o = 0; o < Octets; o++)
          mma<T>(part[i % 2][o], fragment[0], fragment[1], fragment[2], fragment[3], columns[2 * o],
                 columns[2 * o + 1]);
        if (i + kDeep < kLookups) look_up(i + kDeep);
      }
    }
    // Everybody has stored the row before, and so has added up the one before that, whose buffer this is.
    if (row > job.row_begin) wait_for_row(row - 1);
    if (mine) {
#pragma unroll
      for (int o = 0; o < Octets; o++)
        *reinterpret_cast<float4*>(sums + (row_count + row) % 2 * kBuffer + (o * kWarps + warp) * 128 + lane * 4) =
            make_float4(part[0][o][0] + part[1][o][0], part[0][o][1] + part[1][o][1], part[0][o][2] + part[1][o][2],
                        part[0][o][3] + part[1][o][3]);
    }
    if (row > job.row_begin) add_up(row - 1);
    __syncwarp();
    if (lane == 0) arrive(shared_address(exchange.full + (row_count + row) % 2));
  }
  wait_for_row(job.row_end - 1);
  add_up(job.row_end - 1);
  __syncthreads();
  if (threadIdx.x == 0) exchange.rows = row_count + job.row_end;
}

}  // namespace vptq
