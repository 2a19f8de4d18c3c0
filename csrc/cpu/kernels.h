// What the layer's driver (linear.cpp) asks of the inner loops, and the instruction sets they exist for.
#pragma once

#include <cstdint>

#include "number.h"

constexpr int kBlock = 256;                // columns summed at a time: their panel stays in the first-level cache
constexpr int kStrip = 16;                 // outputs of a panel
constexpr int kMaxPanelRows = kStrip / 2;  // vector rows of a panel
constexpr int kLookupTokens = 5;           // tokens of a lookup: so many sums fit 16 registers
constexpr int kAhead = 4;                  // columns, of prefetches
constexpr int kStreamSlack = 16;           // words an unpack may read behind its indices

// Vector rows of a lookup, so that its sums leave some of 16 registers of 8 floats free.
constexpr int lookup_rows(int lanes, int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 32 / lanes : 16 / lanes; }

// How a row's bit stream is read: merged indices of `bits` bits, the main index in the low `main_bits`.
struct Stream {
  int bits, main_bits, vector_len;
  uint32_t main_mask, res_mask;  // res_mask is 0 without a residual book

  // For reading eight indices, which take `bits` whole bytes, with byte shuffles. The upper four are taken from 16
  // bytes of their own, which start with the byte that holds their first bit. Of each index: which bytes its first 32
  // bits lie in, which the byte behind (0x80: none is needed), and by how much both are shifted.
  alignas(32) uint8_t first[32], fifth[32];
  alignas(32) uint32_t right[8], left[8];

  Stream(int main_bits, int res_bits, int v)
      : bits(main_bits + res_bits),
        main_bits(main_bits),
        vector_len(v),
        main_mask((1u << main_bits) - 1),
        res_mask((1u << res_bits) - 1) {
    for (int i = 0; i < 8; ++i) {
      const int position = i < 4 ? i * bits : (i - 4) * bits + 4 * bits % 8, byte = position / 8;
      for (int b = 0; b < 4; ++b) {
        first[i * 4 + b] = static_cast<uint8_t>(byte + b);
        fifth[i * 4 + b] = b == 0 && byte + 4 < 16 ? static_cast<uint8_t>(byte + 4) : 0x80;
      }
      right[i] = position % 8;
      left[i] = 32 - position % 8;
    }
  }
};

// Both in the layer's dtype; a load takes 8 or 16 elements from an offset, whatever the vector length.
struct Books {
  const void *main, *residual;
};

// Where the vectors of a block start in their books, in elements. Rows are longer than a block, for prefetches.
struct Offsets {
  alignas(64) uint32_t main[kMaxPanelRows][kBlock + kAhead], residual[kMaxPanelRows][kBlock + kAhead];
};

using Lookup = void(const Books&, const Offsets&, const float* x, int columns, float* sums);
using Decode = void(const Books&, const Offsets&, int rows, int v, int columns, float* panel);

struct SegmentKernels {
  Lookup* lookup[kLookupTokens];  // [tokens - 1]
  Decode* decode;
};

struct WidthKernels {
  SegmentKernels segment[2][2];  // [has residual][main book too large for the nearer caches]
};

// One instruction set. `multiply` takes up to max_tokens.
struct Kernels {
  void (*unpack)(const Stream&, const uint32_t* words, int count, uint32_t* main, uint32_t* residual);
  void (*multiply)(const float* panel, const float* x, int columns, int tokens, float* sums);
  int max_tokens;
  WidthKernels width[kNumDTypes][2];  // [][v > 8]
};

enum InstructionSet : int64_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
