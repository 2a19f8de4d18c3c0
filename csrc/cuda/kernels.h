// The C++ interface between the kernels and the torch binding: raw pointers, no torch, no templates.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vptq {

// How a job finds its weights: compact.cu, sliced.cuh, resident.cuh (codes of one byte for one book, of one byte for
// each of two books, of two bytes), wide.cuh (codes of two bytes for a book in memory; with those of one byte for a
// second book in shared memory); or, in the compact layout, that it has none and is the dot product of a norm.
enum class Kind : int {
  kCompact = 0,
  kSliced = 1,
  kBytes = 2,
  kBytePairs = 3,
  kShorts = 4,
  kDot = 5,
  kFar = 6,
  kFarBytes = 7
};

// One thread block's piece of work, as vllm_vptq/layouts/work.py writes it: 25 int32.
struct Job {
  int kind;
  int scale;                     // of the module's column norm: offset in `norm`, or -1
  int column_list;               // compact: offset in `columns` of the segment's column list, or -1 if it covers all
  int column_begin, column_end;  // within the segment
  int row_begin, row_end;        // vector rows; 16 outputs for kinds with codes; dot: tokens
  int codes;                     // offset in `codes` (int32) of the segment's first row
  int row_words;                 // words from one row (pair) to the next
  int book;                      // offset in `books`: elements for compact, 16-byte rows for the others
  int book_rows;                 // rows to hold in shared memory; compact: entries
  int res_book;                  // or -1
  int res_rows;
  int copies;      // images of the book in shared memory; far: 16-byte rows of an entry
  int lists;       // sliced: offset in `codes` of the offsets of this slice's lists; far with bytes: of the bytes
  int list_tiles;  // sliced: column tiles, i.e. lists per vector row; far with bytes: words of 16 outputs
  int out;         // where its sums go: offset in a token's row of the workspace
  int vector_len, plane;  // elements plane * 8 .. of every vector
  int index_bits, res_bits;
  int shift;   // of the norm: offset in `norm` of what its dot product is with, or -1 for ones
  int width;   // sliced: 16 if both planes of a vector are looked up, that at `res_book` too, else 8; far: 16 outputs
               // are two planes of a vector row; or 8, and they are one of two vector rows
  int source;  // where its columns begin in a row of prepared activations, or -1 if it takes them as they are in x
  int dot;     // sliced: where the dot product of its columns goes, if it begins with row 0, in a token's row of the
               // workspace; or -1
};
static_assert(sizeof(Job) == 100, "25 int32");

// Outputs a block of wide.cuh computes at once: 64 a warp group, of which there are four where registers allow it.
__host__ __device__ constexpr int wide_rows(int slots, Kind only) {
  const bool resident = only == Kind::kBytes || only == Kind::kBytePairs || only == Kind::kShorts;
  return resident && slots <= 32 ? 256 : 192;
}
constexpr int kGranule = 256;  // columns: its jobs begin at multiples of it, and multiply whole ones

constexpr int kCountedSums = 64;

// Sums that belong to the same outputs: `splits` rows of the workspace, `stride` apart.
struct Part {
  int out;
  int splits, stride;
  int vector_len, skip;
  int plane, width;  // these sums are elements plane * 8 to plane * 8 + width of every vector
  int counts;        // where in `work` to find how many of the splits there are, one int32 per kCountedSums; or -1
};
static_assert(sizeof(Part) == 32, "8 int32");

struct Module {
  int out_begin, out_end;
  int part_begin, part_end;
  int dot;    // offset in a token's row of the workspace of numbers whose sum is meant for all outputs, or -1
  int dots;   // how many
  int scale;  // row norm: offset in `norm` of a factor per output, or -1
  int shift;  // row norm: offset of what the dot product is multiplied by, or -1
  int dense;  // outputs come from elsewhere: leave them
};
static_assert(sizeof(Module) == 36, "9 int32");

constexpr int kPrepareColumns = 4096;  // of a block of prepare.cu, at most

// What a block does to activations that many blocks of other kernels want: columns gathered and scaled, a part of a
// norm's dot product.
struct Preparation {
  int scale;                     // offset in `norm` of a factor per input, or -1
  int column_list;               // offset in `columns`, or -1: columns are the input's
  int column_begin, column_end;  // begin: a multiple of kPrepareColumns
  int at;     // where the first goes in a row of prepared activations, a multiple of 8, zeros up to a granule; or -1
  int shift;  // offset in `norm` of what the dot product is with, or -1 for ones
  int dot;    // where the dot product goes in a token's row of the workspace, or -1
};
static_assert(sizeof(Preparation) == 28, "7 int32");

enum class Type : int { kHalf = 0, kBfloat16 = 1 };

struct Layer {
  const int32_t* codes;
  const void* books;
  const float* norm;
  const int32_t* columns;
};

struct Tokens {
  const void* x;  // [count, row_stride]
  int64_t row_stride;
  int count;
};

// The jobs of a call: thread block i takes jobs starts[i] to starts[i + 1]; their sums go to the workspace [tokens,
// stride].
struct Launch {
  const Job* jobs;
  const int32_t* starts;
  int thread_blocks;
  float* workspace;
  int64_t stride;
  int shared_bytes;
  cudaStream_t stream;
};

// Sums of up to 16 tokens; of up to `slots`, which are 8, 16, 32, 64 or 128, on Hopper, all jobs being of kind `only`,
// or of several if that is kDot; or, one job a block, of up to 8 in the compact layout.
cudaError_t multiply(Type type, const Layer&, const Tokens&, const Tokens& prepared, const Launch&);
using MultiplyWide = cudaError_t(Kind only, const Layer&, const Tokens&, const Tokens& prepared, int slots,
                                 const Launch&);
MultiplyWide multiply_wide_half_few, multiply_wide_half_many;  // up to 32 slots; 64 and 128
MultiplyWide multiply_wide_bfloat16_few, multiply_wide_bfloat16_many;
cudaError_t multiply_compact(Type type, const Layer&, const Tokens&, const Launch&);

// Activations [tokens, prepared_stride] for the products above, and dot products into the workspace.
cudaError_t prepare(Type type, const Layer&, const Tokens&, const Preparation* records, int count, void* prepared,
                    int64_t prepared_stride, float* workspace, int64_t stride, cudaStream_t);

// y [tokens, out_features] of the sums: splits added in order, norm and bias applied, rounded once. The records are
// taken from the host where they fit a kernel's arguments, else from the device.
cudaError_t finish(Type type, const Module* modules, int module_count, const Part* parts, int part_count,
                   const Module* device_modules, const Part* device_parts, const int32_t* work, const float* workspace,
                   int64_t stride, const float* norm, const void* bias, void* y, int out_features, int tokens,
                   cudaStream_t);

// A bit stream of merged indices [rows, row_words] (see docs/format.md); one of its two parts: `width` bits at `shift`.
struct Stream {
  const int32_t* words;
  int rows, columns, row_words;
  int bits, shift, width;
};

// Entries of each list of the sliced layout, [slices, rows, tiles], a slice being 1 << slice_bits entries of the book;
// then the lists, from `offsets` (in groups of 32).
cudaError_t count_entries(const Stream&, int slice_bits, int slices, int tiles, int32_t* counts, cudaStream_t);
cudaError_t fill_lists(const Stream&, int slice_bits, int slices, int tiles, const int32_t* offsets, int32_t* lists,
                       cudaStream_t);
// Codes [ceil(rows / 2), loads, 32, 4] of a resident kind, for a book of book_rows entries in `copies` images, or of
// the far one; where its `width` (see Job) is 16, [rows, loads, 16, 4], each for two lanes.
cudaError_t fill_codes(Kind kind, const Stream&, const Stream& residual, int loads, int book_rows, int copies,
                       int width, int32_t* codes, cudaStream_t);

// Outputs of a module that are wanted: [begin, end).
struct Window {
  int begin, end;
};

// Weights of a segment's plane or two: those that `job` looks up, and `residual`, unless its kind is -1, added to them;
// norm applied. They go to `weight`, [outputs of the window, stride].
struct Decoding {
  Job job, residual;
  Module module;
  Part part;
  Window window;
  void* weight;
};

cudaError_t decode(Type type, const Layer&, const Decoding* decodings, int count, int64_t stride, cudaStream_t);

// The same for all planes of a segment in the compact layout.
cudaError_t decode_compact(Type type, const Layer&, const Job&, const Module&, const Part&, void* weight,
                           int64_t stride, const Window&, cudaStream_t);

}  // namespace vptq
