// A stationary layer's weights, for products with many tokens, which are left to cuBLAS.
//
// A warp takes a pair of vector rows and 64 columns at a time. Its lanes look their vectors up through the caches, add
// the residual's, apply the norm, and pass them through shared memory, where ldmatrix.trans turns vectors of 8 outputs
// into rows of 8 columns: rows of the matrix are what a product wants to read.
#include <algorithm>

#include "resident.cuh"

namespace vptq {
namespace {

constexpr int kDecodeWarps = 8;
constexpr int kWarpColumns = 128;  // whose codes a lane gets by one load, or half of one
constexpr int kStage = 128;        // vectors of a warp in shared memory: 2 rows, 64 columns

// The eight steps of 16 columns of one load of codes, or of half of one: which entry each looks up.
struct Codes {
  const uint4* words;
  Kind kind;
  int row_words, rows8;

  __device__ Codes(const Layer& layer, const Job& job)
      : words(reinterpret_cast<const uint4*>(layer.codes + job.codes)), kind(Kind(job.kind)),
        row_words(job.row_words), rows8((job.book_rows + 7) & ~7) {}

  __device__ __forceinline__ uint4 load(int row, int block, int lane) const {
    const int32_t* from = reinterpret_cast<const int32_t*>(words) + size_t(row) * row_words;
    if (kind == Kind::kBytes) {
      const uint2 half = __ldg(reinterpret_cast<const uint2*>(from + (block / 2 * 32 + lane) * 4 + block % 2 * 2));
      return make_uint4(half.x, half.y, 0, 0);
    }
    return load_once(reinterpret_cast<const uint4*>(from) + block * 32 + lane);
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

template <typename T>
__device__ __forceinline__ void widen(float (&to)[8], const uint4& raw) {
  const T* v = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int e = 0; e < 8; e++) to[e] = Number<T>::wide(v[e]);
}

// What a warp's lane looks up of 64 columns, from one book or from two.
template <int Books>
struct Vectors {
  uint4 of[Books][4];
};

template <typename T, int Books>
__global__ void __launch_bounds__(kDecodeWarps * 32, 2)
    decode_kernel(const Layer layer, const __grid_constant__ Job job, const __grid_constant__ Job residual,
                  const Module module, const Part part, T* __restrict__ weight, int64_t stride, const Window window,
                  int first_row, int rows, int blocks) {
  __shared__ uint4 staged[kDecodeWarps][kStage];
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
  auto look_up = [&](const Words& words, auto half) {
    Vectors<Books> found;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      found.of[0][i] = __ldg(book + size_t(codes.entry(words.of[0], half * 4 + i, false)) * planes);
      if (Books == 2)
        found.of[Books - 1][i] =
            pairs ? __ldg(res_book + codes.entry(words.of[0], half * 4 + i, true))
                  : __ldg(res_book + size_t(more.entry(words.of[Books - 1], half * 4 + i, false)) * res_planes);
    }
    return found;
  };
  auto first_output = [&](int row, int half) {  // of the vectors of lanes whose `odd` is `half`
    const int vector_row = wide ? row : 2 * row + half;
    return vector_row * part.vector_len + (job.plane + (wide ? half : 0)) * 8 - part.skip;
  };
  auto store = [&](int unit, int half, Vectors<Books>& found) {
    const int row = first_row + unit / blocks, begin = unit % blocks * kWarpColumns + half * 64;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at = i * 16 + lane_column;  // within 64 columns
      uint4 raw = found.of[0][i];
      if (Books == 2 || scale || module.scale >= 0) {
        float value[8];
        widen<T>(value, raw);
        if (Books == 2) {
          float other[8];
          widen<T>(other, found.of[Books - 1][i]);
#pragma unroll
          for (int e = 0; e < 8; e++) value[e] += other[e];
        }
        if (scale) {
          const int column = min(begin + at, job.column_end - 1);
          const int source = list ? __ldg(list + column) : column;
          const float factor = __ldg(scale + source), offset = __ldg(shift + source);
#pragma unroll
          for (int e = 0; e < 8; e++) value[e] = value[e] * factor + offset;
        }
        if (module.scale >= 0) {
          const int mine = first_output(row, odd);
#pragma unroll
          for (int e = 0; e < 8; e++) {
            const int output = min(max(mine + e, 0), module.out_end - module.out_begin - 1);
            value[e] = value[e] * __ldg(layer.norm + module.scale + output) + __ldg(layer.norm + module.shift + output);
          }
        }
        T out[8];
#pragma unroll
        for (int e = 0; e < 8; e++) out[e] = Number<T>::narrow(value[e]);
        raw = make_uint4(pack(out[0], out[1]), pack(out[2], out[3]), pack(out[4], out[5]), pack(out[6], out[7]));
      }
      // Columns that ldmatrix reads together lie in different banks.
      staged[warp][odd * 64 + (at ^ (at >> 3 << 1 & 7))] = raw;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // Row j of matrix m is column 8 (j / 2) + 2 m + j % 2, so that a lane ends with 8 consecutive ones of an output.
      const int at = i % 2 * 32 + lane % 8 / 2 * 8 + lane / 8 * 2 + lane % 2, vectors = i / 2;
      unsigned columns[4];
      ldmatrix_trans(columns, shared_address(&staged[warp][vectors * 64 + (at ^ (at >> 3 << 1 & 7))]));
      const int element = lane / 4, output = first_output(row, vectors) + element;
      const int elements = part.vector_len - (job.plane + (wide ? vectors : 0)) * 8;
      const int column = begin + i % 2 * 32 + lane % 4 * 8;
      if (element >= elements || output < window.begin || output >= window.end) continue;
      T* to = weight + int64_t(output - window.begin) * stride;
      if (!list && column + 8 <= job.column_end && stride % 8 == 0) {
        *reinterpret_cast<uint4*>(to + column) = make_uint4(columns[0], columns[1], columns[2], columns[3]);
      } else {
        const T* values = reinterpret_cast<const T*>(columns);
#pragma unroll
        for (int e = 0; e < 8; e++)
          if (column + e < job.column_end) to[list ? __ldg(list + column + e) : column + e] = values[e];
      }
    }
  };

  // Vectors of the next 64 columns, and codes of those behind, are under way while these are stored.
  const int step = gridDim.x * kDecodeWarps, units = rows * blocks;
  int unit = blockIdx.x * kDecodeWarps + warp;
  if (unit >= units) return;
  Words words = load(unit), next = load(min(unit + step, units - 1));
  constexpr std::integral_constant<int, 0> kFirst;
  constexpr std::integral_constant<int, 1> kSecond;
  Vectors<Books> first = look_up(words, kFirst);
  for (; unit < units; unit += step) {
    Vectors<Books> second = look_up(words, kSecond);
    store(unit, 0, first);
    words = next;
    next = load(min(unit + 2 * step, units - 1));
    first = look_up(words, kFirst);
    store(unit, 1, second);
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
  // As many as are at work at once on a large GPU.
  const int grid = std::min((blocks * (last - first) + kDecodeWarps - 1) / kDecodeWarps, 2 * 160);
  auto go = [&](auto kernel, auto number) {
    return launch(kernel, dim3(grid), kDecodeWarps * 32, 0, stream, false, layer, job, residual, module, part,
                  static_cast<decltype(number)*>(weight), stride, window, first, last - first, blocks);
  };
  auto books = [&](auto one, auto two, auto number) {
    return residual.kind >= 0 || Kind(job.kind) == Kind::kBytePairs ? go(two, number) : go(one, number);
  };
  return type == Type::kHalf ? books(decode_kernel<__half, 1>, decode_kernel<__half, 2>, __half())
                             : books(decode_kernel<__nv_bfloat16, 1>, decode_kernel<__nv_bfloat16, 2>, __nv_bfloat16());
}

}  // namespace vptq
