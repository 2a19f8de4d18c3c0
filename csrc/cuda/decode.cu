// A stationary layer's weights, for products with many tokens: the same jobs as multiply, but every looked-up vector
// is stored. The matrix is transposed, [in, out], so that a vector's elements lie next to each other.
#include "resident.cuh"

namespace vptq {
namespace {

// Where looked-up vectors of a job go, and what happens to them on the way.
template <typename T>
struct Sink {
  T* weight;
  int64_t stride;
  const float *scale, *shift, *row_scale, *row_shift;
  const int32_t* list;
  int vector_len, count, first;  // of the plane's elements; output of element 0 of vector row 0
  Window window;
  bool accumulate, last;

  __device__ Sink(const Layer& layer, const Job& job, const Module& module, const Part& part, void* weight_,
                  int64_t stride_, const Window& window_, bool accumulate_, bool last_)
      : weight(static_cast<T*>(weight_)), stride(stride_),
        scale(last_ && job.scale >= 0 ? layer.norm + job.scale : nullptr),
        shift(last_ && job.shift >= 0 ? layer.norm + job.shift : nullptr),
        row_scale(last_ && module.scale >= 0 ? layer.norm + module.scale : nullptr),
        row_shift(last_ && module.scale >= 0 ? layer.norm + module.shift : nullptr),
        list(job.column_list < 0 ? nullptr : layer.columns + job.column_list), vector_len(part.vector_len),
        count(min(8, part.vector_len - part.plane * 8)), first(part.plane * 8 - part.skip), window(window_),
        accumulate(accumulate_), last(last_) {}

  // Vector rows that touch the window: [begin, end).
  __device__ int begin() const { return max(0, window.begin - first - count + 1 + vector_len - 1) / vector_len; }
  __device__ int end() const { return (max(0, window.end - first) + vector_len - 1) / vector_len; }

  __device__ __forceinline__ void put(int row, int column, const uint4& raw) const {
    const int source = list ? __ldg(list + column) : column;
    const int output = row * vector_len + first;
    T* to = weight + source * stride + output - window.begin;
    const bool whole = count == 8 && output >= window.begin && output + 8 <= window.end &&
                       reinterpret_cast<uintptr_t>(to) % 16 == 0;
    if (whole && !accumulate && !scale && !row_scale) {
      *reinterpret_cast<uint4*>(to) = raw;
      return;
    }
    const T* v = reinterpret_cast<const T*>(&raw);
    uint4 before = make_uint4(0, 0, 0, 0);
    if (whole && accumulate) before = *reinterpret_cast<const uint4*>(to);
    const float factor = scale ? __ldg(scale + source) : 1.f, offset = shift ? __ldg(shift + source) : 0.f;
    T out[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int at = output + e;
      const bool inside = e < count && at >= window.begin && at < window.end;
      float value = Number<T>::wide(v[e]);
      if (accumulate && inside)
        value += Number<T>::wide(whole ? reinterpret_cast<const T*>(&before)[e] : to[e]);
      value = value * factor + offset;
      if (row_scale && inside) value = value * row_scale[at] + row_shift[at];
      out[e] = Number<T>::narrow(value);
      if (inside && !whole) to[e] = out[e];
    }
    if (whole)
      *reinterpret_cast<uint4*>(to) = make_uint4(pack(out[0], out[1]), pack(out[2], out[3]), pack(out[4], out[5]),
                                                 pack(out[6], out[7]));
  }
};

template <typename T>
__device__ void decode_sliced(const Layer& layer, const Job& job, const Sink<T>& sink, uint4* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_end = min(job.row_end, sink.end());
  int row = max(job.row_begin, sink.begin()) + warp;
  if (row - warp >= row_end) return;
  const uint4* book = static_cast<const uint4*>(layer.books) + job.book;
  for (int i = threadIdx.x; i < job.book_rows; i += kThreads) copy_async16(shared_address(shared + i), book + i);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const int* lists = layer.codes + job.lists;
  const unsigned* entries = reinterpret_cast<const unsigned*>(layer.codes) + job.codes + lane;
  const int tiles = job.list_tiles;
  for (; row < row_end; row += kWarps) {
    for (int span = 0; span * kSpanTiles < tiles; span++) {
      const int begin = __ldg(lists + row * tiles + span * kSpanTiles);
      const int end = __ldg(lists + row * tiles + min((span + 1) * kSpanTiles, tiles));
#pragma unroll 4
      for (int at = begin; at < end; at++) {
        const unsigned word = load_once<0>(entries + size_t(at) * 32);
        const unsigned entry = join_entry(word, __shfl_sync(kAllLanes, word, lane_of_row(lane)));
        if (!entry_pads(entry)) sink.put(row, entry_column(entry, span), shared[entry_slice_row(entry)]);
      }
    }
  }
}

template <typename T, Kind kKind>
__device__ void decode_resident(const Layer& layer, const Job& job, const Sink<T>& sink, uint4* shared) {
  constexpr bool kByteCodes = kKind != Kind::kShorts;
  constexpr bool kPairs = kKind == Kind::kBytePairs;
  constexpr int kSteps = steps_per_load(kKind);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = sink.begin(), last_row = sink.end();
  const int row_end = min(job.row_end, (last_row + 1) / 2), row_begin = max(job.row_begin, first_row / 2);
  if (row_begin >= row_end) return;
  fill_images<kByteCodes>(shared, static_cast<const uint4*>(layer.books) + job.book, job.book_rows, job.copies);
  const uint4* residual = shared + ((job.book_rows + 7) & ~7) * job.copies;
  if (kPairs)
    fill_images<kByteCodes>(const_cast<uint4*>(residual), static_cast<const uint4*>(layer.books) + job.res_book,
                            job.res_rows, job.copies);
  __syncthreads();
  const int first_load = job.column_begin / (kSteps * 16);
  const int loads = (job.column_end + kSteps * 16 - 1) / (kSteps * 16) - first_load;
  const uint4* codes = reinterpret_cast<const uint4*>(layer.codes + job.codes) + lane;
  // Rows first: what they store lies side by side.
  const int pairs = row_end - row_begin;
  for (int i = warp; i < loads * pairs; i += kWarps) {
    const int load = first_load + i / pairs, pair = row_begin + i % pairs;
    const uint4 words = load_once(codes + pair * size_t(job.row_words / 4) + load * 32);
    const int row = 2 * pair + (lane >> 3 & 1);
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      const unsigned word = s * 4 / kSteps == 0 ? words.x : s * 4 / kSteps == 1 ? words.y : s * 4 / kSteps == 2
                                                                                      ? words.z : words.w;
      const int column = (load * kSteps + s) * 16 + lane % 8 + lane / 16 * 8;
      if (column >= job.column_end || row < first_row || row >= last_row) continue;
      uint4 raw;
      if (kKind == Kind::kBytes) raw = shared[(word >> (8 * (s % 4)) & 0xff) * 8 + lane % 8];
      if (kKind == Kind::kBytePairs) raw = shared[(word >> (16 * (s % 2)) & 0xff) * 8 + lane % 8];
      if (kKind == Kind::kShorts) raw = shared[word >> (16 * (s % 2)) & 0xffff];
      if (kPairs) {
        const uint4 extra = residual[(word >> (16 * (s % 2) + 8) & 0xff) * 8 + lane % 8];
        T* v = reinterpret_cast<T*>(&raw);
        const T* w = reinterpret_cast<const T*>(&extra);
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = Number<T>::narrow(Number<T>::wide(v[e]) + Number<T>::wide(w[e]));
      }
      sink.put(row, column, raw);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const Layer layer, const Job* __restrict__ jobs, const Module module, const Part part, void* weight,
                  int64_t stride, const Window window, bool accumulate, bool last) {
  extern __shared__ uint4 shared[];
  const Job job = jobs[blockIdx.x];
  const Sink<T> sink(layer, job, module, part, weight, stride, window, accumulate, last);
  switch (Kind(job.kind)) {
    case Kind::kSliced: decode_sliced<T>(layer, job, sink, shared); break;
    case Kind::kBytes: decode_resident<T, Kind::kBytes>(layer, job, sink, shared); break;
    case Kind::kBytePairs: decode_resident<T, Kind::kBytePairs>(layer, job, sink, shared); break;
    default: decode_resident<T, Kind::kShorts>(layer, job, sink, shared);
  }
}

}  // namespace

cudaError_t decode(Type type, const Layer& layer, const Job* jobs, int job_count, const Module& module,
                   const Part& part, void* weight, int64_t stride, const Window& window, bool accumulate, bool last,
                   int shared_bytes, cudaStream_t stream) {
  auto go = [&](auto kernel) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    return launch(kernel, dim3(job_count), kThreads, shared_bytes, stream, false, layer, jobs, module, part, weight,
                  stride, window, accumulate, last);
  };
  return type == Type::kHalf ? go(decode_kernel<__half>) : go(decode_kernel<__nv_bfloat16>);
}

}  // namespace vptq
