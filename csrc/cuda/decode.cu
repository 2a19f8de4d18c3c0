// A stationary layer's weights, for products with many tokens, which are left to cuBLAS.
//
// A warp keeps to 32 columns, whose norm stays in its registers, and walks down the vector rows. There ldmatrix.trans
// turns vectors of 8 outputs into rows of the matrix: which vector each of its lanes names is chosen such that a lane
// gets 8 consecutive columns of one output, 16 bytes to be stored. Small books lie in shared memory, and vectors are
// read from them directly; from others they are copied there, two rows ahead.
#include <algorithm>

#include "resident.cuh"

namespace vptq {
namespace {

constexpr int kStripColumns = 32;  // of a warp
constexpr int kDecodeWarps = 16;
constexpr int kDecodeThreads = kDecodeWarps * 32;
constexpr int kSpanColumns = kDecodeWarps * kStripColumns;  // of a block
constexpr int kMostDecodings = 8;                           // of a launch, whose arguments they are
constexpr int kCopiesAhead = 2;                             // rows whose vectors are
constexpr int kOwnBytes = 1024;                             // of shared memory, that each block takes more
constexpr int kRowBytes = 2 * 32 * 16;                      // that a warp copies for a row
constexpr int kCopiedBytes = kDecodeWarps * kCopiesAhead * kRowBytes;

// Where the vectors of a book are: nowhere; in eight images of each in shared memory; in one; in memory.
enum class Look { kNone, kBytes, kShorts, kCopied };

struct Decodings {
  Decoding of[kMostDecodings];
  int first_row[kMostDecodings], rows[kMostDecodings];  // of 16 outputs, or of two vectors
  int blocks[kMostDecodings + 1];                       // before those of each
  int count;
  int hot;  // of a book in memory, the first entries that are held in shared memory all the same
};

// A lane is 8 * matrix + row for ldmatrix. It names column 8 (row / 2) + 2 * matrix + row % 2 of a strip, so that the
// four pairs of numbers that a lane gets are of neighbouring columns. A code of that column is in the words of another
// lane of the order that resident.cuh loads them in: of a word's two steps in the first or the second. Where entries
// have 16 elements, two lanes copy one, for the column that lane / 2 names, then for the one that lane / 2 + 16 does.
struct Place {
  int lane_of_codes;  // for the first of two loads
  int second_step;

  __device__ explicit Place(bool wide) {
    const int lane = wide ? threadIdx.x % 32 / 2 : threadIdx.x % 32, row = lane % 8;
    lane_of_codes = (row / 2 % 2) * (wide ? 8 : 16) + lane / 8 * 2 + row % 2;
    second_step = row / 4;
  }
};

// A book, and a lane's codes that point into it.
template <Look kLook>
struct Book {
  const uint4* entries;  // in memory
  int planes;            // 16-byte rows of each
  int rows8;             // of an image, of which the code names one; 0 if it is the entry
  uint32_t images;       // in shared memory: the lane's
  unsigned hot;          // entries of a book in memory that are there
  const unsigned* words;
  int row_words, second_words;  // words to the next row, and to the second load of the same
  unsigned pick;                // bytes of a word that are the code, as __byte_perm takes them

  __device__ Book(const Layer& layer, const Job& job, uint32_t shared, bool second, int hot_) : hot(hot_) {
    const Kind kind = Kind(job.kind);
    const bool of_pair = second && kind == Kind::kBytePairs;
    entries = static_cast<const uint4*>(layer.books) + (of_pair ? job.res_book : job.book);
    planes = kind == Kind::kFar ? job.copies : 1;
    if (kind == Kind::kFar) entries += job.plane + (job.width == 16 ? threadIdx.x % 2 : 0);
    rows8 = kind == Kind::kShorts ? (job.book_rows + 7) & ~7 : 0;
    images = shared + (kLook == Look::kBytes ? threadIdx.x % 8 * 16 : 0);
  }

  __device__ __forceinline__ void begin(const Layer& layer, const Job& job, const Place& place, int strip,
                                        bool second) {
    const Kind kind = Kind(job.kind);
    const bool wide = job.width == 16;
    const int loads = kind == Kind::kBytes ? strip / 8 : strip / 4;
    const int word = kind == Kind::kBytes ? strip % 8 / 2 : strip % 4;
    words = reinterpret_cast<const unsigned*>(layer.codes) + job.codes +
            (loads * (wide ? 16 : 32) + place.lane_of_codes) * 4 + word;
    row_words = job.row_words;
    second_words = (wide ? 4 : 8) * 4;
    const int byte = kind == Kind::kBytes ? strip % 2 * 2 + place.second_step : place.second_step * 2;
    if (kind == Kind::kBytes)
      pick = 0x4440 | byte;
    else if (kind == Kind::kBytePairs)
      pick = 0x4440 | (byte + second);
    else
      pick = 0x4400 | (byte + 1) << 4 | byte;
  }

  __device__ __forceinline__ unsigned load(int row, int half) const {
    return __ldg(words + size_t(row) * row_words + half * second_words);
  }
  __device__ __forceinline__ unsigned entry(unsigned word) const {
    const unsigned code = __byte_perm(word, 0, pick);
    if (kLook == Look::kBytes) return code;
    return kLook == Look::kShorts || rows8 ? entry_of_image_row(code, rows8) : code;
  }
  // Of the images, or of what was copied.
  __device__ __forceinline__ uint32_t address(unsigned word, uint32_t copied) const {
    const unsigned at = entry(word);
    if (kLook == Look::kCopied) return at < hot ? images + at * 16 : copied;
    return images + at * (kLook == Look::kBytes ? 128 : 16);
  }
  __device__ __forceinline__ void copy(uint32_t to, unsigned word) const {
    const unsigned at = entry(word);
    if (at < hot) return;
    if (rows8)
      copy_async16_cached(to, entries + size_t(at) * planes);
    else
      copy_async16(to, entries + size_t(at) * planes);  // the L1 cache would seldom have it
  }
  // By all threads of a block, which are to meet afterwards.
  __device__ __forceinline__ void fill(uint4* shared, int rows) const {
    if constexpr (kLook == Look::kBytes) fill_images<true>(shared, entries, rows, 8);
    if (kLook == Look::kCopied) rows = hot;
    if (rows && (kLook == Look::kShorts || kLook == Look::kCopied)) {
      const int first = blockIdx.x * 61 % rows;  // see fill_images
      for (int i = threadIdx.x; i < rows; i += kDecodeThreads) {
        const int row = i + first < rows ? i + first : i + first - rows;
        copy_async16(shared_address(shared + row), entries + row);
      }
      copy_async_commit();
      copy_async_wait<0>();
    }
  }
};

__host__ __device__ constexpr int image_bytes(Look look, int rows) {
  return look == Look::kBytes ? rows * 128 : look == Look::kShorts ? (rows + 7 & ~7) * 16 : 0;
}

// Entries of a book in memory to be held in shared memory, where those of two planes do not lie beside each other.
__host__ __device__ constexpr int hot_rows(const Job& job, int most) {
  if (Kind(job.kind) != Kind::kFar || job.copies != 1) return 0;
  return most < job.book_rows ? most : job.book_rows;
}

// Both numbers rounded once.
__device__ __forceinline__ unsigned rounded(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ __forceinline__ unsigned rounded(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

__device__ __forceinline__ void load8(float (&to)[8], const float* from) {
  const float4 low = __ldg(reinterpret_cast<const float4*>(from));
  const float4 high = __ldg(reinterpret_cast<const float4*>(from) + 1);
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
  to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

template <Look kMain, Look kResidual>
__host__ __device__ constexpr int decode_blocks() {  // per multiprocessor
  const bool copies = kMain == Look::kCopied || kResidual == Look::kCopied;
  return copies || (kMain == Look::kShorts && kResidual == Look::kShorts) ? 1 : 2;
}

template <typename T, Look kMain, Look kResidual>
__global__ void __launch_bounds__(kDecodeThreads, (decode_blocks<kMain, kResidual>()))
    decode_kernel(const Layer layer, const __grid_constant__ Decodings all, int64_t stride) {
  constexpr bool kPairs = kMain == Look::kBytes && kResidual == Look::kBytes;
  constexpr int kStreams = kResidual == Look::kNone || kPairs ? 1 : 2;
  constexpr bool kCopies = kMain == Look::kCopied || kResidual == Look::kCopied;
  constexpr int kAhead = kCopies ? 8 : 4;  // rows whose codes are on their way
  static_assert(kAhead % kCopiesAhead == 0);
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  int which = 0;
  while (int(blockIdx.x) >= all.blocks[which + 1]) which++;
  const Decoding& d = all.of[which];
  const Job &job = d.job, &residual = kPairs || kResidual == Look::kNone ? d.job : d.residual;
  const bool wide = job.width == 16;
  const Place place(wide);

  // Shared memory: images of both books, then what is copied.
  const int hot = kMain == Look::kCopied ? hot_rows(job, all.hot) : 0;
  uint4* res_images = shared + image_bytes(kMain, job.book_rows) / 16 + hot;
  const int res_rows = kPairs ? job.res_rows : residual.book_rows;
  uint4* copied = res_images + image_bytes(kResidual, res_rows) / 16;
  const uint32_t copied_bytes = shared_address(copied) + warp * kCopiesAhead * kRowBytes;
  const uint32_t to_copied = copied_bytes + (wide ? lane % 2 * 32 + lane / 2 : lane) * 16;
  const uint32_t from_copied = copied_bytes + lane * 16;
  constexpr uint32_t kSecond = kMain == Look::kCopied ? kCopiedBytes : 0;  // to the other book's vectors
  Book<kMain> book(layer, job, shared_address(shared), false, hot);
  Book<kResidual> res_book(layer, residual, shared_address(res_images), true, 0);

  struct Words {
    unsigned of[kStreams][2];
  };
  auto load = [&](int row) {
    Words words;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      words.of[0][half] = book.load(row, half);
      if (kStreams == 2) words.of[kStreams - 1][half] = res_book.load(row, half);
    }
    return words;
  };
  auto copy = [&](const Words& words, int slot) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t to = to_copied + slot * kRowBytes + half * (wide ? kRowBytes / 4 : kRowBytes / 2);
      if (kMain == Look::kCopied) book.copy(to, words.of[0][half]);
      if (kResidual == Look::kCopied) res_book.copy(to + kSecond, words.of[kStreams - 1][half]);
    }
    copy_async_commit();
  };

  // As many blocks for each span as there are walk side by side, a row of each in turn, so that all write close
  // together. The others take the last rows: units are rows of a span, span after span, and a block takes a piece of
  // them.
  const int rows = all.rows[which], nth = blockIdx.x - all.blocks[which];
  const int blocks = all.blocks[which + 1] - all.blocks[which];
  const int spans = (job.column_end + kSpanColumns - 1) / kSpanColumns, together = blocks / spans;
  const int others = blocks - together * spans, shared_rows = int(int64_t(rows) * (blocks - others) / blocks);
  const bool alone = nth >= together * spans;
  const int64_t units = int64_t(spans) * (rows - shared_rows), other = nth - together * spans;
  const int last = alone ? int(units * (other + 1) / others) : 1;
  const bool has_scale = job.scale >= 0, has_list = job.column_list >= 0, has_row_norm = d.module.scale >= 0;
  const float *scales = layer.norm + job.scale, *shifts = layer.norm + job.shift;
  const int32_t* list = layer.columns + job.column_list;
  const int row_outputs = wide ? job.vector_len : 2 * job.vector_len, half_outputs = wide ? 8 : job.vector_len;
  const int element = job.plane * 8 + lane / 4;
  bool filled = false;
  for (int unit = alone ? int(units * other / others) : 0, next; unit < last; unit = next) {
    const int own_rows = alone ? rows - shared_rows : 1, first = alone ? shared_rows + unit % own_rows : nth / spans;
    next = min(last, unit - unit % own_rows + own_rows);
    const int strip = (alone ? unit / own_rows : nth % spans) * kDecodeWarps + warp, step = alone ? 1 : together;
    const int begin = all.first_row[which] + first;
    const int end = alone ? begin + next - unit : all.first_row[which] + shared_rows;
    if (begin >= end) break;
    const int column = strip * kStripColumns + lane % 4 * 8;  // the first of this lane's
    const bool inside = strip * kStripColumns < job.column_end;
    const bool whole = !has_list && column + 8 <= job.column_end && stride % 8 == 0;
    Words ahead[kAhead];
    float scale[8] = {1, 1, 1, 1, 1, 1, 1, 1}, shift[8] = {};
    if (inside) {
      book.begin(layer, job, place, strip, false);
      res_book.begin(layer, residual, place, strip, true);
#pragma unroll
      for (int i = 0; i < kAhead; i++) ahead[i] = load(min(begin + i * step, end - 1));
      if (has_scale && whole && (job.scale | job.shift) % 4 == 0) {
        load8(scale, scales + column);
        load8(shift, shifts + column);
      } else if (has_scale) {
#pragma unroll
        for (int e = 0; e < 8; e++) {
          const int at = min(column + e, job.column_end - 1), source = has_list ? __ldg(list + at) : at;
          scale[e] = __ldg(scales + source);
          shift[e] = __ldg(shifts + source);
        }
      }
    }
    if (!filled) {
      book.fill(shared, job.book_rows);
      res_book.fill(res_images, res_rows);
      __syncthreads();
      wait_for_previous();  // it may be reading the weights that were here before
      filled = true;
    }
    if (!inside) continue;
    if (kCopies) {
#pragma unroll
      for (int i = 0; i < kCopiesAhead; i++) copy(ahead[i], i);
    }
    // In the window, which `size` is of; of the second vector row, or of the second half of one, that many further.
    int output = begin * row_outputs + element - d.part.skip - d.window.begin;
    const int size = d.window.end - d.window.begin;
    const int sizes[2] = {element < job.vector_len ? size : 0, element + (wide ? 8 : 0) < job.vector_len ? size : 0};
    T* to = static_cast<T*>(d.weight) + output * stride + column;
    // The next row; `usual`: there is no norm over rows, and every lane has 8 columns that lie side by side.
    auto store = [&](const Words& words, int slot, auto usual) {
      constexpr bool kUsual = decltype(usual)::value;
      if (kCopies) {
        copy_async_wait<kCopiesAhead - 1>();
        __syncwarp();
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t from = from_copied + slot * kRowBytes + half * kRowBytes / 2;
        unsigned columns[4], extra[4];
        ldmatrix_trans(columns, book.address(words.of[0][half], from));
        if (kResidual != Look::kNone)
          ldmatrix_trans(extra, res_book.address(words.of[kStreams - 1][half], from + kSecond));
        const int mine = output + half * half_outputs;
        if (unsigned(mine) >= unsigned(sizes[half])) continue;
        if (kResidual != Look::kNone || has_scale || (!kUsual && has_row_norm)) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float2 value = unpack<T>(columns[e]);
            if (kResidual != Look::kNone) {
              const float2 more = unpack<T>(extra[e]);
              value.x += more.x;
              value.y += more.y;
            }
            value.x = value.x * scale[2 * e] + shift[2 * e];
            value.y = value.y * scale[2 * e + 1] + shift[2 * e + 1];
            if (!kUsual && has_row_norm) {
              const float factor = __ldg(layer.norm + d.module.scale + d.window.begin + mine);
              const float offset = __ldg(layer.norm + d.module.shift + d.window.begin + mine);
              value.x = value.x * factor + offset;
              value.y = value.y * factor + offset;
            }
            columns[e] = rounded(value.x, value.y, T());
          }
        }
        T* out = to + half * half_outputs * stride;
        if (kUsual) {
          *reinterpret_cast<uint4*>(out) = make_uint4(columns[0], columns[1], columns[2], columns[3]);
        } else {
#pragma unroll
          for (int e = 0; e < 8; e++) {
            const uint16_t bits = uint16_t(columns[e / 2] >> e % 2 * 16);
            if (column + e < job.column_end)
              reinterpret_cast<uint16_t*>(out)[has_list ? __ldg(list + column + e) - column : e] = bits;
          }
        }
      }
      if (kCopies) __syncwarp();
      output += step * row_outputs;
      to += step * row_outputs * stride;
    };
    if (!has_row_norm && __all_sync(kAllLanes, whole)) {
      // Words stay in their registers: to move them would be to wait for them.
      for (int row = begin; row < end; row += kAhead * step) {
        unrolled<kAhead>([&](auto i) {
          if (row + i * step >= end) return;
          store(ahead[i], i % kCopiesAhead, std::true_type());
          if (kCopies) copy(ahead[(i + kCopiesAhead) % kAhead], i % kCopiesAhead);
          ahead[i] = load(min(row + (i + kAhead) * step, end - 1));
        });
      }
    } else {
      int slot = 0;
      for (int row = begin; row < end; row += step, slot = (slot + 1) % kCopiesAhead) {
        store(ahead[0], slot, std::false_type());
        if (kCopies) copy(ahead[kCopiesAhead], slot);
#pragma unroll
        for (int i = 0; i + 1 < kAhead; i++) ahead[i] = ahead[i + 1];
        ahead[kAhead - 1] = load(min(row + kAhead * step, end - 1));
      }
    }
    if (kCopies) {
      copy_async_wait<0>();
      __syncwarp();
    }
  }
}

struct Looks {
  Look main, residual;
  bool operator==(const Looks& other) const { return main == other.main && residual == other.residual; }
};

// Shared memory, in bytes: all of a multiprocessor's, and what a block may have.
struct SharedMemory {
  int multiprocessor, block;

  cudaError_t find(int device) {
    const cudaError_t error =
        cudaDeviceGetAttribute(&multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (error != cudaSuccess) return error;
    return cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  int rows() const { return (block - 8 * kOwnBytes) / 16; }  // of images, with some to spare
};

// How the books of a decoding are looked up. What has no kernel of its own, or no room, is copied.
Looks looks_of(const Decoding& d, int most_rows) {
  auto look = [](int kind) {
    if (kind < 0) return Look::kNone;
    return Kind(kind) == Kind::kFar ? Look::kCopied : Kind(kind) == Kind::kShorts ? Look::kShorts : Look::kBytes;
  };
  if (Kind(d.job.kind) == Kind::kBytePairs) return {Look::kBytes, Look::kBytes};
  const Looks looks{look(d.job.kind), look(d.residual.kind)};
  if (looks.residual == Look::kNone || looks == Looks{Look::kCopied, Look::kBytes}) return looks;
  if (looks == Looks{Look::kShorts, Look::kShorts} && d.job.book_rows + d.residual.book_rows <= most_rows) return looks;
  return {Look::kCopied, Look::kCopied};
}

int shared_bytes(const Looks& looks, const Decoding& d) {
  const int res_rows = Kind(d.job.kind) == Kind::kBytePairs ? d.job.res_rows : d.residual.book_rows;
  int bytes = image_bytes(looks.main, d.job.book_rows) + image_bytes(looks.residual, res_rows);
  for (Look look : {looks.main, looks.residual}) bytes += look == Look::kCopied ? kCopiedBytes : 0;
  return bytes;
}

// Divides the thread blocks that run at once among the decodings, by their work.
void divide(Decodings& all, int blocks) {
  int64_t units[kMostDecodings], own[kMostDecodings], left = blocks, total = 0;
  for (int i = 0; i < all.count; i++) {
    units[i] = int64_t(all.of[i].job.column_end + kSpanColumns - 1) / kSpanColumns * all.rows[i];
    total += units[i];
  }
  for (int i = 0; i < all.count; i++) {
    own[i] = std::max<int64_t>(1, std::min(units[i], blocks * units[i] / total));
    left -= own[i];
  }
  auto share = [&](int i) { return own[i] < units[i] ? double(units[i]) / own[i] : 0.; };
  for (; left > 0; left--) {
    int most = 0;
    for (int i = 1; i < all.count; i++) most = share(i) > share(most) ? i : most;
    if (own[most] == units[most]) break;
    own[most]++;
  }
  for (int i = 0; i < all.count; i++) all.blocks[i + 1] = all.blocks[i] + int(own[i]);
}

}  // namespace

cudaError_t decode(Type type, const Layer& layer, const Decoding* decodings, int count, int64_t stride,
                   cudaStream_t stream) {
  int device, processors;
  SharedMemory memory;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = memory.find(device);
  if (error != cudaSuccess) return error;

  Decodings some = {};
  // Those collected, which are looked up alike.
  auto go = [&](auto kernel, int at_once, const Looks& looks) {
    int bytes = 0;
    for (int i = 0; i < some.count; i++) bytes = std::max(bytes, shared_bytes(looks, some.of[i]));
    at_once = std::min(at_once, memory.multiprocessor / (bytes + kOwnBytes));
    divide(some, processors * at_once);
    some.hot = std::max(0, memory.rows() - bytes / 16);
    int hot = 0;
    for (int i = 0; i < some.count && looks.main == Look::kCopied; i++)
      hot = std::max(hot, hot_rows(some.of[i].job, some.hot));
    bytes += hot * 16;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    const int all = memory.multiprocessor;
    const int percent = std::min(100, (at_once * (bytes + kOwnBytes) * 100 + all - 1) / all);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, percent);
    if (error == cudaSuccess)
      error = launch(kernel, dim3(some.blocks[some.count]), kDecodeThreads, bytes, stream, true, layer, some, stride);
    some.count = 0;
  };
  auto alike = [&](auto main, auto residual) {
    constexpr Look kMain = decltype(main)::value, kResidual = decltype(residual)::value;
    const Looks looks{kMain, kResidual};
    auto flush = [&] {
      constexpr int kAtOnce = decode_blocks<kMain, kResidual>();
      if (type == Type::kHalf)
        go(decode_kernel<__half, kMain, kResidual>, kAtOnce, looks);
      else
        go(decode_kernel<__nv_bfloat16, kMain, kResidual>, kAtOnce, looks);
    };
    for (int i = 0; i < count && error == cudaSuccess; i++) {
      const Decoding& d = decodings[i];
      if (!(looks_of(d, memory.rows()) == looks)) continue;
      // Rows of 16 outputs, or of two vectors, that touch the window.
      const int outputs = d.job.width == 16 ? d.part.vector_len : 2 * d.part.vector_len;
      const int first = (d.window.begin + d.part.skip) / outputs;
      const int last = std::min((d.window.end + d.part.skip + outputs - 1) / outputs, d.job.row_end);
      if (last <= first) continue;
      some.of[some.count] = d;
      some.first_row[some.count] = first;
      some.rows[some.count] = last - first;
      if (++some.count == kMostDecodings) flush();
    }
    if (some.count && error == cudaSuccess) flush();
  };
  constexpr std::integral_constant<Look, Look::kNone> kNone;
  constexpr std::integral_constant<Look, Look::kBytes> kBytes;
  constexpr std::integral_constant<Look, Look::kShorts> kShorts;
  constexpr std::integral_constant<Look, Look::kCopied> kCopied;
  alike(kBytes, kNone);
  alike(kBytes, kBytes);
  alike(kShorts, kNone);
  alike(kShorts, kShorts);
  alike(kCopied, kNone);
  alike(kCopied, kBytes);
  alike(kCopied, kCopied);
  return error;
}

}  // namespace vptq
