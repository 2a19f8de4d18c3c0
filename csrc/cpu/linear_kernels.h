// The inner loops, over the vectors of one instruction set. Included inside a namespace, once per instruction set,
// after its simd_*.h.
//
// Every output is summed in the same order everywhere: one fused multiply-add a column, columns ascending, within a
// block of kBlock columns. So a token's result does not depend on how many tokens come with it.

// The vector at a column, looked up. Those of a far book are asked for a few columns ahead: a processor looks ahead by
// itself, but not far enough to hide a cache miss.
template <int W, bool kResidual, bool kFar, class E>
VPTQ_TARGET inline Lanes<W> vector_at(const Books& books, const Offsets& offsets, int row, int column) {
  const E* main = static_cast<const E*>(books.main);
  if constexpr (kFar) __builtin_prefetch(main + offsets.main[row][column + kAhead]);
  const Lanes<W> first = load<W>(main + offsets.main[row][column]);
  if constexpr (!kResidual) return first;
  return add(first, load<W>(static_cast<const E*>(books.residual) + offsets.residual[row][column]));
}

// A few vector rows applied to a few tokens, x [columns][kTokens], straight from the books: sums [kTokens][rows][16].
// Independent sums keep the FMA units busy without splitting one; rows share the broadcast of x, tokens the vector.
template <int W, int kTokens, bool kResidual, bool kFar, class E>
VPTQ_TARGET void lookup(const Books& books, const Offsets& offsets, const float* x, int columns, float* sums) {
  constexpr int kRows = lookup_rows(W, kTokens);
  Lanes<W> sum[kTokens][kRows];
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r) sum[t][r] = zero<W>();
  for (int j = 0; j < columns; ++j) {
    for (int r = 0; r < kRows; ++r) {
      const Lanes<W> weights = vector_at<W, kResidual, kFar, E>(books, offsets, r, j);
      for (int t = 0; t < kTokens; ++t) sum[t][r] = multiply_add(x[j * kTokens + t], weights, sum[t][r]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r) store(sums + (t * kRows + r) * kStrip, sum[t][r]);
}

// Looks up `rows` vector rows into a panel [columns][16] float32, where each takes v of the 16 lanes. A store covers W
// lanes: what it writes too much is overwritten by the next vector, so the order matters, and the panel has a tail.
template <int W, bool kResidual, bool kFar, class E>
VPTQ_TARGET void decode(const Books& books, const Offsets& offsets, int rows, int v, int columns, float* panel) {
  for (int j = 0; j < columns; ++j)
    for (int r = 0; r < rows; ++r)
      store(panel + j * kStrip + r * v, vector_at<W, kResidual, kFar, E>(books, offsets, r, j));
}

// sums [tokens][16] = x [columns][tokens] applied to the panel [columns][16].
template <int kTokens>
VPTQ_TARGET void multiply_tokens(const float* panel, const float* x, int columns, float* sums) {
  Lanes<kStrip> sum[kTokens];
  for (int t = 0; t < kTokens; ++t) sum[t] = zero<kStrip>();
  for (int j = 0; j < columns; ++j) {
    const Lanes<kStrip> weights = load<kStrip>(panel + j * kStrip);
    for (int t = 0; t < kTokens; ++t) sum[t] = multiply_add(x[j * kTokens + t], weights, sum[t]);
  }
  for (int t = 0; t < kTokens; ++t) store(sums + t * kStrip, sum[t]);
}

template <int kTokens = kMaxTokens>
void multiply(const float* panel, const float* x, int columns, int tokens, float* sums) {
  if (tokens == kTokens) {
    multiply_tokens<kTokens>(panel, x, columns, sums);
  } else if constexpr (kTokens > 1) {
    multiply<kTokens - 1>(panel, x, columns, tokens, sums);
  }
}

template <int W, bool kResidual, bool kFar, class E>
constexpr SegmentKernels kernels_of() {
  return {{lookup<W, 1, kResidual, kFar, E>, lookup<W, 2, kResidual, kFar, E>, lookup<W, 3, kResidual, kFar, E>,
           lookup<W, 4, kResidual, kFar, E>, lookup<W, 5, kResidual, kFar, E>},
          decode<W, kResidual, kFar, E>};
}

template <int W, class E>
constexpr WidthKernels kernels_of() {
  return {{{kernels_of<W, false, false, E>(), kernels_of<W, false, true, E>()},
           {kernels_of<W, true, false, E>(), kernels_of<W, true, true, E>()}}};
}

const Kernels kKernels = {unpack,
                          multiply<>,
                          kMaxTokens,
                          {{kernels_of<8, float>(), kernels_of<16, float>()},
                           {kernels_of<8, Half>(), kernels_of<16, Half>()},
                           {kernels_of<8, BFloat>(), kernels_of<16, BFloat>()}}};

#undef VPTQ_TARGET
