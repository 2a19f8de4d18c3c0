// Products with 8 to 128 tokens: three or four warp groups look weights up, a thread orders activations.
//
// A warp keeps to 16 outputs and walks along the columns. ldmatrix.trans of the centroids of 2 vector rows x 16 columns
// is the A fragment of a wgmma, as in resident.cuh; but the activations are its B operand, which the tensor core reads
// from shared memory by itself, once for 64 outputs. So a look-up serves all tokens, and sums stay in registers. A book
// that does not fit shared memory stays where it is, and every warp gathers what it needs into a ring of its own.
#pragma once

#include "resident.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"

namespace vptq {

constexpr int kRingBytes = 32768;  // of activations
constexpr int kMostStages = 8;
constexpr int kStepBytes = 512;  // of a step's 32 vectors; a warp gathers those of a granule
constexpr int kFarBytes = kGranule / 16 * kStepBytes;

// The ring lies in front of the books, and may be larger for many tokens where books leave room.
__host__ __device__ constexpr int ring_bytes(int slots, Kind only) {
  return slots == 128 && only != Kind::kShorts && only != Kind::kDot ? 2 * kRingBytes : kRingBytes;
}

// A tile of activations: [columns / kAcross][N][kAcross], each as wgmma_descriptor wants it.
template <int kSlots, Kind kOnly>
struct Shape {
  static constexpr int N = kSlots, kRing = ring_bytes(N, kOnly);
  static constexpr int kWarps = wide_rows(N, kOnly) / 16, kConsumers = kWarps * 32;
  static constexpr int kAcross = kRing / (N * 128) >= 4 ? 64 : 32;
  static constexpr int kColumns = N <= 16 ? 256 : N == 32 ? 128 : kAcross;
  static constexpr int kBytes = N * kColumns * 2;
  static constexpr int kStages = kRing / kBytes;
  static constexpr int kThreads = kConsumers + 32;  // of which one orders activations
  // A thread's, so few where they suffice that a block of finish.cu finds room beside: a quarter of a multiprocessor
  // has 16384 for its four or five warps, and a warp of that block takes 2048.
  static constexpr int kRegisters = N == 128 || kOnly == Kind::kDot || (N == 64 && kOnly == Kind::kFarBytes) ? 128
                                    : kWarps == 16                                                           ? 88
                                                                                                             : 112;
  static_assert(kStages >= 2 && kStages <= kMostStages);

  // Where 16 columns of a stage, the step `s`, lie in the ring.
  static __device__ __forceinline__ uint32_t place(int stage, int s) {
    return stage * kBytes + s / (kAcross / 16) * N * kAcross * 2 + s % (kAcross / 16) * 32;
  }
};

struct Ring {
  uint64_t full[kMostStages], empty[kMostStages];

  template <typename Tile>
  __device__ void initialise() {
    for (int i = 0; i < Tile::kStages; i++) {
      initialise_barrier(shared_address(full + i), 1);
      initialise_barrier(shared_address(empty + i), Tile::kWarps);
    }
  }
};

// Orders activations, by one thread; as many tiles are under way as there are stages.
template <typename Tile>
__device__ __forceinline__ void order_activations(const CUtensorMap* map, int first_column, const Job& job, Ring& ring,
                                                  unsigned& done, uint32_t stages) {
  const int granules = (job.column_end - job.column_begin + kGranule - 1) / kGranule;
  int column = first_column + job.column_begin;
  for (int tile = 0; tile < granules * (kGranule / Tile::kColumns); tile++, done++) {
    const int stage = done % Tile::kStages;
    sleep_until_phase(shared_address(ring.empty + stage), done / Tile::kStages & 1 ^ 1);
    announce_bulk_copy(shared_address(ring.full + stage), Tile::kBytes);
#pragma unroll
    for (int i = 0; i < Tile::kColumns / Tile::kAcross; i++, column += Tile::kAcross)
      copy_tile(stages + Tile::place(stage, i * Tile::kAcross / 16), map, column, shared_address(ring.full + stage));
  }
}

template <typename T, typename Tile, Kind kKind>
__device__ __forceinline__ void consume(const Layer& layer, const Tokens& tokens, const Job& job, Ring& ring,
                                        unsigned& done, uint32_t stages, uint4* books, float* workspace,
                                        int64_t stride) {
  constexpr int N = Tile::N;
  constexpr bool kFar = kKind == Kind::kFar || kKind == Kind::kFarBytes;
  constexpr bool kTwo = kKind == Kind::kBytePairs || kKind == Kind::kFarBytes;  // books
  constexpr int kLoads = kKind == Kind::kBytes ? 1 : 2;                         // of codes, for a granule
  constexpr int kMore = kKind == Kind::kFarBytes ? 1 : 0;                       // of the residual's
  constexpr int kChunkSteps = N == 128 || kTwo ? 1 : 2;  // steps of 16 columns, looked up together
  constexpr int kAhead = 2, kBuffers = 4;  // chunks that are looked up before they are multiplied; that have registers
  constexpr int kChunks = kGranule / 16 / kChunkSteps;
  constexpr int kTileChunks = Tile::kColumns / 16 / kChunkSteps;
  static_assert(kTileChunks >= 2 && kChunks % kTileChunks == 0 && kChunks % kBuffers == 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = job.row_begin + warp;
  const bool mine = row < job.row_end;

  const int first_granule = job.column_begin / kGranule;
  const int granules = (job.column_end - job.column_begin + kGranule - 1) / kGranule;
  // Of entries of 16 elements, two lanes want the halves: they share a code.
  const bool halves_of_16 = kKind == Kind::kFar && job.width == 16;
  auto load_size = [&] { return kKind == Kind::kFar && job.width == 16 ? 16 : 32; };  // costs no register
  const int row_loads = job.row_words / 4 / load_size(), res_row_loads = job.list_tiles / 128;
  const int any_row = mine ? row : job.row_begin;
  const uint4* codes = reinterpret_cast<const uint4*>(layer.codes + job.codes) +
                       size_t(any_row) * row_loads * load_size() + (halves_of_16 ? lane / 2 : lane);
  const uint4* res_codes =
      reinterpret_cast<const uint4*>(layer.codes + job.lists) + size_t(any_row) * res_row_loads * 32 + lane;
  // Codes of this granule and the next; and, where those of the next are needed at once to gather, of the one after it.
  using Codes = uint4[kLoads + kMore];
  Codes now, next, after;
  auto load_codes = [&](Codes& to, int granule) {
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      const int load = (first_granule + granule) * kLoads + l;
      to[l] = make_uint4(0, 0, 0, 0);
      if (granule < granules && load < row_loads && mine) to[l] = load_once(codes + load * load_size());
    }
    if constexpr (kMore) {
      const int load = first_granule + granule;
      to[kLoads] = make_uint4(0, 0, 0, 0);
      if (granule < granules && load < res_row_loads && mine) to[kLoads] = load_once(res_codes + load * 32);
    }
  };
  // What step `s` of a granule (a constant) looks up in the first or the second book.
  auto code = [&](const Codes& words, int s, bool second) -> unsigned {
    const bool bytes = kKind == Kind::kBytes || (kMore && second);
    const uint4& load = words[kMore && second ? kLoads : bytes ? 0 : s / 8];
    const int at = bytes ? s / 4 : s % 8 / 2;
    const unsigned word = at == 0 ? load.x : at == 1 ? load.y : at == 2 ? load.z : load.w;
    if (bytes) return word >> (8 * (s % 4)) & 0xff;
    if (kKind == Kind::kBytePairs) return word >> (16 * (s % 2) + 8 * second) & 0xff;
    return word >> (16 * (s % 2)) & 0xffff;
  };

  const uint32_t base = shared_address(books) + (kKind == Kind::kShorts ? 0 : lane % 8 * 16);
  const uint32_t res_base = kKind == Kind::kBytePairs ? base + ((job.book_rows + 7) & ~7) * job.copies * 16 : base;
  const uint32_t gathered = shared_address(books) + (kMore ? ((job.res_rows + 7) & ~7) * 8 * 16 : 0) + warp * kFarBytes;
  // Both halves of an entry of 32 bytes are asked for by neighbouring lanes, that they be fetched once.
  const uint32_t gather_to = gathered + (halves_of_16 ? lane / 2 % 8 + lane % 2 * 8 + lane / 16 * 16 : lane) * 16;
  const uint4* far = static_cast<const uint4*>(layer.books) + job.book + job.plane + (halves_of_16 ? lane % 2 : 0);
  auto gather = [&](int chunk, bool wanted) {  // of the granule whose codes are `next`
    if (wanted && mine) {
#pragma unroll
      for (int i = 0; i < kChunkSteps; i++) {
        const int s = chunk * kChunkSteps + i;
        copy_async16(gather_to + s * kStepBytes, far + size_t(code(next, s, false)) * job.copies);
      }
    }
    copy_async_commit();
  };
  unsigned a[kBuffers][kChunkSteps][4];
  constexpr int kApart = kAhead - 1;  // chunks whose residual vectors are still to be added
  unsigned residual[kApart][kChunkSteps][4];
  auto look_up_one = [&](unsigned (&to)[4], const Codes& words, int s, bool second) {
    if (kFar && !second)
      ldmatrix_trans(to, gathered + s * kStepBytes + lane * 16);
    else
      ldmatrix_trans(to, (second ? res_base : base) + code(words, s, second) * (kKind == Kind::kShorts ? 16 : 128));
  };
  auto look_up = [&](const Codes& words, int chunk) {
#pragma unroll
    for (int i = 0; i < kChunkSteps; i++) {
      const int s = chunk * kChunkSteps + i;
      look_up_one(a[chunk % kBuffers][i], words, s, false);
      if constexpr (kTwo) look_up_one(residual[chunk % kApart][i], words, s, true);
    }
  };

  auto add_residual = [&](int chunk) {
    if constexpr (kTwo) {
#pragma unroll
      for (int i = 0; i < kChunkSteps; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) add_pairs<T>(a[chunk % kBuffers][i][e], residual[chunk % kApart][i][e]);
    }
  };

  float sums[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) sums[i] = 0.f;
  load_codes(next, 0);
  if constexpr (kFar) {
    load_codes(after, 1);
#pragma unroll
    for (int c = 0; c < kChunks; c++) gather(c, true);
    copy_async_wait<kChunks - kAhead>();
    __syncwarp();
  }
#pragma unroll
  for (int c = 0; c < kAhead; c++) {
    if (c >= kApart) add_residual(c - kApart);
    look_up(next, c);
  }
  auto release = [&](unsigned tile) {
    if (lane == 0) arrive(shared_address(ring.empty + tile % Tile::kStages));
  };
  for (int g = 0; g < granules; g++) {
#pragma unroll
    for (int l = 0; l < kLoads + kMore; l++) {
      now[l] = next[l];
      if (kFar) next[l] = after[l];
    }
    load_codes(kFar ? after : next, g + (kFar ? 2 : 1));
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      // While this chunk is multiplied, the one before may still be; those after it are looked up.
      wgmma_wait<1>();
      if (c % kTileChunks == 1 && (g || c > 1)) release(done - 1);
      if constexpr (kFar) {
        copy_async_wait<kChunks - kAhead - 1>();
        __syncwarp();
      }
      add_residual(c + 1);
      if (c + kAhead < kChunks)
        look_up(now, c + kAhead);
      else
        look_up(next, c + kAhead - kChunks);
      const int stage = done % Tile::kStages;
      if (c % kTileChunks == 0) sleep_until_phase(shared_address(ring.full + stage), done / Tile::kStages & 1);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kChunkSteps; i++) {
        const int s = c % kTileChunks * kChunkSteps + i;  // within the tile
        wgmma<T, N>(sums, a[c % kBuffers][i], wgmma_descriptor<Tile::kAcross * 2>(stages + Tile::place(stage, s)));
      }
      wgmma_commit();
      if constexpr (kFar) gather(c, g + 1 < granules);
      if ((c + 1) % kTileChunks == 0) done++;
    }
  }
  wgmma_wait<0>();
  release(done - 1);
  wait_for_previous();  // whose sums may lie in this workspace
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (mine && token < tokens.count)
      workspace[token * stride + job.out + row * 16 + i / 2 % 2 * 8 + lane / 4] = sums[i];
  }
}

// What activations are found by: as they are, and prepared.
struct Maps {
  CUtensorMap x, prepared;
};

// `kOnly`: the kind of all jobs, or kDot if there are several, which takes more registers than wgmma would like to
// have.
template <typename T, int N, Kind kOnly>
__global__ void __maxnreg__((Shape<N, kOnly>::kRegisters))
    wide_kernel(const Layer layer, const Tokens tokens, const __grid_constant__ Maps maps, const Job* __restrict__ jobs,
                const int32_t* __restrict__ starts, float* __restrict__ workspace, int64_t stride) {
#if VPTQ_HAS_WGMMA
  extern __shared__ __align__(1024) char wide_shared[];
  __shared__ Job job;
  __shared__ Ring ring;
  let_next_start();
  using Tile = Shape<N, kOnly>;
  uint4* books = reinterpret_cast<uint4*>(wide_shared + Tile::kRing);
  const int first = starts[blockIdx.x], last = starts[blockIdx.x + 1];
  if (threadIdx.x == 0) ring.initialise<Tile>();
  unsigned done = 0;  // tiles
  int held = -1, res_held = -1;
  for (int j = first; j < last; j++) {
    __syncthreads();
    if (threadIdx.x < sizeof(Job) / 4)
      reinterpret_cast<int*>(&job)[threadIdx.x] = reinterpret_cast<const int*>(jobs + j)[threadIdx.x];
    __syncthreads();
    const Kind kind = kOnly == Kind::kDot ? Kind(job.kind) : kOnly;
    if (kind == Kind::kFar) {
      held = -1;
    } else if (held != job.book || res_held != job.res_book) {
      held = job.book;
      res_held = job.res_book;
      const uint4* all = static_cast<const uint4*>(layer.books);
      if (kind == Kind::kFarBytes) {
        fill_images<true>(books, all + job.res_book, job.res_rows, 8);
      } else if (kind == Kind::kShorts) {
        fill_images<false>(books, all + job.book, job.book_rows, job.copies);
      } else {
        fill_images<true>(books, all + job.book, job.book_rows, job.copies);
        if (kind == Kind::kBytePairs)
          fill_images<true>(books + ((job.book_rows + 7) & ~7) * job.copies, all + job.res_book, job.res_rows,
                            job.copies);
      }
      __syncthreads();
    }
    if (threadIdx.x >= Tile::kConsumers) {
      wait_for_previous();
      if (threadIdx.x == Tile::kConsumers)
        order_activations<Tile>(job.source < 0 ? &maps.x : &maps.prepared, max(job.source, 0), job, ring, done,
                                shared_address(wide_shared));
      __syncwarp();
      continue;
    }
    const uint32_t stages = shared_address(wide_shared);
    switch (kind) {
      case Kind::kBytes:
        consume<T, Tile, Kind::kBytes>(layer, tokens, job, ring, done, stages, books, workspace, stride);
        break;
      case Kind::kBytePairs:
        consume<T, Tile, Kind::kBytePairs>(layer, tokens, job, ring, done, stages, books, workspace, stride);
        break;
      case Kind::kShorts:
        consume<T, Tile, Kind::kShorts>(layer, tokens, job, ring, done, stages, books, workspace, stride);
        break;
      case Kind::kFarBytes:
        consume<T, Tile, Kind::kFarBytes>(layer, tokens, job, ring, done, stages, books, workspace, stride);
        break;
      default:
        consume<T, Tile, Kind::kFar>(layer, tokens, job, ring, done, stages, books, workspace, stride);
    }
  }
#else
  __trap();  // never launched here: layouts/stationary.py asks for it on Hopper only
#endif
}

template <typename T, int N, Kind kOnly>
cudaError_t run_wide(const Layer& layer, const Tokens& tokens, const Tokens& prepared, const Launch& work) {
  using Tile = Shape<N, kOnly>;
  auto kernel = wide_kernel<T, N, kOnly>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, work.shared_bytes);
  if (error != cudaSuccess) return error;
  Maps maps = {};
  auto describe = [&](const Tokens& from, CUtensorMap& map) {
    const Type type = std::is_same_v<T, __half> ? Type::kHalf : Type::kBfloat16;
    return describe_tiles(type, from, N, Tile::kAcross * 2, map);
  };
  if (tokens.row_stride % 8 == 0) error = describe(tokens, maps.x);  // rows of another size are prepared, all of them
  if (error == cudaSuccess && prepared.row_stride) error = describe(prepared, maps.prepared);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(work.thread_blocks), Tile::kThreads, work.shared_bytes, work.stream, true, layer, tokens,
                maps, work.jobs, work.starts, work.workspace, work.stride);
}

template <typename T, int N>
cudaError_t run_wide_of(Kind only, const Layer& layer, const Tokens& tokens, const Tokens& prepared,
                        const Launch& work) {
  auto go = [&](auto run) { return run(layer, tokens, prepared, work); };
  switch (only) {
    case Kind::kBytes:
      return go(run_wide<T, N, Kind::kBytes>);
    case Kind::kBytePairs:
      return go(run_wide<T, N, Kind::kBytePairs>);
    case Kind::kShorts:
      return go(run_wide<T, N, Kind::kShorts>);
    case Kind::kFar:
      return go(run_wide<T, N, Kind::kFar>);
    case Kind::kFarBytes:
      return go(run_wide<T, N, Kind::kFarBytes>);
    default:
      return go(run_wide<T, N, Kind::kDot>);
  }
}

// By the kernels for one of some numbers of slots.
template <typename T, int... Slots>
cudaError_t multiply_wide_of(Kind only, const Layer& layer, const Tokens& tokens, const Tokens& prepared, int slots,
                             const Launch& work) {
  cudaError_t error = cudaErrorInvalidValue;
  if (tokens.count > slots) return error;
  ((slots == Slots ? void(error = run_wide_of<T, Slots>(only, layer, tokens, prepared, work)) : void()), ...);
  return error;
}

}  // namespace vptq
