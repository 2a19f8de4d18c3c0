// A stationary layer's weights, for products with many tokens, which are left to cuBLAS.
//
// A warp takes a pair of vector rows and 64 columns at a time. Vectors are copied to shared memory, two pieces of work
// ahead; there ldmatrix.trans turns vectors of 8 outputs into rows of 8 columns, since rows of the matrix are what a
// product wants to read; and the lane that holds 8 columns of an output adds the residual and applies the norm.
#include <algorithm>

#include "resident.cuh"

namespace vptq {
namespace {

constexpr int kWarpColumns = 128;  // whose codes a lane gets by one load, or half of one
constexpr int kPiece = 128;        // vectors of a piece of work: 2 rows, 64 columns
__host__ __device__ constexpr int decode_warps(int books) { return 8 / books; }            // of a block
__host__ __device__ constexpr int decode_blocks(int books) { return books == 1 ? 3 : 5; }  // per multiprocessor

// The eight steps of 16 columns of one load of codes, or of half of one: which entry each looks up.
struct Codes {
  const uint4* words;
  Kind kind;
  int row_words, rows8;
  bool halves;  // of entries of 16 elements, whose code two lanes share

  __device__ Codes(const Layer& layer, const Job& job)
      : words(reinterpret_cast<const uint4*>(layer.codes + job.codes)),
        kind(Kind(job.kind)),
        row_words(job.row_words),
        rows8((job.book_rows + 7) & ~7),
        halves(job.width == 16) {}

  __device__ __forceinline__ uint4 load(int row, int block, int lane) const {
    const int32_t* from = reinterpret_cast<const int32_t*>(words) + size_t(row) * row_words;
    if (kind == Kind::kBytes) {
      const uint2 half = __ldg(reinterpret_cast<const uint2*>(from + (block / 2 * 32 + lane) * 4 + block % 2 * 2));
      return make_uint4(half.x, half.y, 0, 0);
    }
    return load_once(reinterpret_cast<const uint4*>(from) + (halves ? block * 16 + lane / 2 : block * 32 + lane));
  }
  // `s` is a constant; of pairs, the entry of the second book.
  __device__ __forceinline__ unsigned entry(const uint4& load, int s, bool second) const {
    if (kind == Kind::kBytes) return (s < 4 ? load.x : load.y) >> (8 * (s % 4)) & 0xff;
    const unsigned word = s / 2 == 0 ? load.x : s / 2 == 1 ? load.y : s / 2 == 2 ? load.z : load.w;
    const unsigned code = word >> (16 * (s % 2)) & 0xffff;
    if (kind == Kind::kBytePairs) return second ? code >> 8 : code & 0xff;
    if (kind == Kind::kFar) return code;
    return entry_of_image_row(code, rows8);
  }
};

// Adds 8 numbers.
template <typename T>
__device__ __forceinline__ void add(float (&to)[8], const unsigned (&from)[4]) {
  const T* v = reinterpret_cast<const T*>(from);
#pragma unroll
  for (int e = 0; e < 8; e++) to[e] += Number<T>::wide(v[e]);
}

template <typename T, int Books>
__global__ void __launch_bounds__(decode_warps(Books) * 32, decode_blocks(Books))
    decode_kernel(const Layer layer, const __grid_constant__ Job job, const __grid_constant__ Job residual,
                  const Module module, const Part part, T* __restrict__ weight, int64_t stride, const Window window,
                  int first_row, int rows, int blocks) {
  __shared__ uint4 staged[decode_warps(Books)][2][Books][kPiece];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool wide = job.width == 16;  // a vector row has two planes here; else there are two vector rows
  const bool pairs = Kind(job.kind) == Kind::kBytePairs;
  const int odd = wide ? lane % 2 : lane >> 3 & 1, lane_column = wide ? lane / 2 : lane % 8 + lane / 16 * 8;
  const Codes codes(layer, job), more(layer, residual);
  auto book_of = [&](const Job& j) {
    return static_cast<const uint4*>(layer.books) + j.book +
           (Kind(j.kind) == Kind::kFar ? j.plane + (wide ? odd : 0) : 0);
  };
  const uint4* book = book_of(job);
  const uint4* res_book = pairs ? static_cast<const uint4*>(layer.books) + job.res_book : book_of(residual);
  const int planes = Kind(job.kind) == Kind::kFar ? job.copies : 1;
  const int res_planes = Kind(residual.kind) == Kind::kFar ? residual.copies : 1;
  const float* scale = job.scale < 0 ? nullptr : layer.norm + job.scale;
  const float* shift = job.shift < 0 ? nullptr : layer.norm + job.shift;
  const int32_t* list = job.column_list < 0 ? nullptr : layer.columns + job.column_list;

  struct Words {
    uint4 of[Books];
  };
  auto load = [&](int unit) {
    Words words;
    const int row = first_row + unit / blocks, block = unit % blocks;
    words.of[0] = codes.load(row, block, lane);
    if (Books == 2 && !pairs) words.of[Books - 1] = more.load(row, block, lane);
    return words;
  };
  // Columns that ldmatrix reads together lie in different banks.
  auto slot = [](int vectors, int column) { return vectors * 64 + (column ^ (column >> 3 << 1 & 7)); };
  auto fetch = [](Kind kind, uint4* to, const uint4* from) {
    if (kind == Kind::kFar)
      copy_async16(shared_address(to), from);  // the L1 cache would seldom have it
    else
      copy_async16_cached(shared_address(to), from);
  };
  auto copy = [&](const Words& words, auto half) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int to = slot(odd, i * 16 + lane_column);
      fetch(codes.kind, &staged[warp][half][0][to],
            book + size_t(codes.entry(words.of[0], half * 4 + i, false)) * planes);
      if (Books == 2)
        fetch(pairs ? codes.kind : more.kind, &staged[warp][half][Books - 1][to],
              res_book + (pairs ? codes.entry(words.of[0], half * 4 + i, true)
                                : size_t(more.entry(words.of[Books - 1], half * 4 + i, false)) * res_planes));
    }
    copy_async_commit();
  };
  auto store = [&](int unit, auto half) {
    const int row = first_row + unit / blocks, begin = unit % blocks * kWarpColumns + half * 64;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // Row j of matrix m is column 8 (j / 2) + 2 m + j % 2, so that a lane ends with 8 consecutive ones of an output.
      const int vectors = i / 2;
      const int from = slot(vectors, i % 2 * 32 + lane % 8 / 2 * 8 + lane / 8 * 2 + lane % 2);
      unsigned columns[4];
      ldmatrix_trans(columns, shared_address(&staged[warp][half][0][from]));
      const int vector_row = wide ? row : 2 * row + vectors, plane = job.plane + (wide ? vectors : 0);
      const int element = lane / 4, output = vector_row * part.vector_len + plane * 8 - part.skip + element;
      const int column = begin + i % 2 * 32 + lane % 4 * 8;
      const bool whole = !list && column + 8 <= job.column_end;
      const bool kept = plane * 8 + element < part.vector_len && output >= window.begin && output < window.end;
      if (Books == 2 || scale || module.scale >= 0) {
        float value[8] = {};
        add<T>(value, columns);
        if (Books == 2) {
          unsigned extra[4];
          ldmatrix_trans(extra, shared_address(&staged[warp][half][Books - 1][from]));
          add<T>(value, extra);
        }
        if (scale && kept) {
#pragma unroll
          for (int e = 0; e < 8; e++) {
            const int at = min(column + e, job.column_end - 1), source = list ? __ldg(list + at) : at;
            value[e] = value[e] * __ldg(scale + source) + __ldg(shift + source);
          }
        }
        if (module.scale >= 0 && kept) {
          const float factor = __ldg(layer.norm + module.scale + output);
          const float offset = __ldg(layer.norm + module.shift + output);
#pragma unroll
          for (int e = 0; e < 8; e++) value[e] = value[e] * factor + offset;
        }
#pragma unroll
        for (int e = 0; e < 4; e++)
          columns[e] = pack(Number<T>::narrow(value[2 * e]), Number<T>::narrow(value[2 * e + 1]));
      }
      if (!kept) continue;
      T* to = weight + int64_t(output - window.begin) * stride;
      if (whole && stride % 8 == 0) {
        *reinterpret_cast<uint4*>(to + column) = make_uint4(columns[0], columns[1], columns[2], columns[3]);
      } else {
        const T* values = reinterpret_cast<const T*>(columns);
#pragma unroll
        for (int e = 0; e < 8; e++)
          if (column + e < job.column_end) to[list ? __ldg(list + column + e) : column + e] = values[e];
      }
    }
  };

  const int step = gridDim.x * decode_warps(Books), units = rows * blocks;
  int unit = blockIdx.x * decode_warps(Books) + warp;
  if (unit >= units) return;
  constexpr std::integral_constant<int, 0> kFirst;
  constexpr std::integral_constant<int, 1> kSecond;
  auto at_most = [&](int u) { return min(u, units - 1); };
  const Words words = load(unit);
  copy(words, kFirst);
  copy(words, kSecond);
  Words next = load(at_most(unit + step));
  for (; unit < units; unit += step) {
    const Words now = next;
    next = load(at_most(unit + 2 * step));
    unrolled<2>([&](auto half) {
      copy_async_wait<1>();
      __syncwarp();
      store(unit, half);
      __syncwarp();
      copy(now, half);
    });
  }
}

}  // namespace

cudaError_t decode(Type type, const Layer& layer, const Job& job, const Job& residual, const Module& module,
                   const Part& part, void* weight, int64_t stride, const Window& window, cudaStream_t stream) {
  // Rows of 16 outputs, or of two vectors, that touch the window.
  const int outputs = job.width == 16 ? part.vector_len : 2 * part.vector_len;
  const int first = (window.begin + part.skip) / outputs;
  const int last = std::min((window.end + part.skip + outputs - 1) / outputs, job.row_end);
  if (last <= first) return cudaSuccess;
  const int blocks = (job.column_end + kWarpColumns - 1) / kWarpColumns;
  int device, processors;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  // Two books of thousands of entries fill the L1 cache: fewer blocks leave more of the memory they share with it.
  const bool crowded = Kind(job.kind) == Kind::kShorts && Kind(residual.kind) == Kind::kShorts;
  auto go = [&](auto kernel, auto number, int books) {
    const int warps = decode_warps(books), grid = (blocks * (last - first) + warps - 1) / warps;
    const int at_once = crowded ? 3 : decode_blocks(books);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, at_once * 33 * 100 / 228);
    if (error != cudaSuccess) return error;
    return launch(kernel, dim3(std::min(grid, processors * at_once)), warps * 32, 0, stream, false, layer, job,
                  residual, module, part, static_cast<decltype(number)*>(weight), stride, window, first, last - first,
                  blocks);
  };
  const bool two = residual.kind >= 0 || Kind(job.kind) == Kind::kBytePairs;
  if (type == Type::kHalf)
    return two ? go(decode_kernel<__half, 2>, __half(), 2) : go(decode_kernel<__half, 1>, __half(), 1);
  return two ? go(decode_kernel<__nv_bfloat16, 2>, __nv_bfloat16(), 2)
             : go(decode_kernel<__nv_bfloat16, 1>, __nv_bfloat16(), 1);
}

}  // namespace vptq
