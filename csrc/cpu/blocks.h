// Block dropout: each block of a row's columns is multiplied once, and draws are sums of those partial products.
#pragma once
#include "dropout.h"
#include "tile.h"

namespace acqcore::ACQCORE_ISA {

// The blocks of a row's columns.
struct Blocks {
  Inner inner;    // packed in whole blocks
  int64_t units;  // per block
  int64_t count;  // per row
};

inline Blocks divide(const HeadArgs& head, const Dropout& dropout) {
  Blocks b;
  b.inner = inner_dimension(head);
  b.units = dropout.block;
  if (b.inner.pairs && dropout.block % 2 != 0) {  // a pair would belong to two blocks
    b.inner.pairs = false;
    b.inner.units = head.hidden.columns;
  }
  if (b.inner.pairs) b.units /= 2;
  const int64_t all = greater(1, b.inner.units);
  b.units = lesser(b.units, all);
  b.count = ceil_div(all, b.units);
  b.inner.depth = lesser(greater(1, kDepth / b.units), b.count) * b.units;
  return b;
}

// Draws every mask of a row.
inline void keep_blocks(const Dropout& dropout, const Blocks& blocks, int64_t row, int draws,
                        bool* keep /* [draws, blocks] */) {
  for (int k = 0; k < draws; ++k) keep_units(dropout, row, k, 0, blocks.count, keep + k * blocks.count);
}

// Products of each block of units [0, k) of a panel of rows with a packed tile.
inline void multiply_blocks(const Blocks& blocks, const float* a /* [k, kPanelRows] */, const float* weights, int width,
                            int64_t k, float* partial /* [blocks, kPlane], rows kTile apart */) {
  for (int64_t begin = 0; begin < k; begin += blocks.units, partial += kPlane) {
    multiply_panel(blocks.inner, a + begin * kPanelRows, weights + begin * kPanelColumns, width,
                   lesser(blocks.units, k - begin), false, partial);
  }
}

// The sum over blocks of a vector of their partial products.
inline Vec sum_blocks(const float* partial /* [blocks, kPlane] */, int64_t blocks) {
  Vec sums[4] = {};  // four short chains: with the subtractions, no less accurate than one long chain
  int64_t b = 0;
  for (; b + 4 <= blocks; b += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] += load(partial + (b + i) * kPlane);
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    if (b + i < blocks) sums[i] += load(partial + (b + i) * kPlane);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

constexpr int kGroup = 4;  // vectors that share a pass over the parts
static_assert(kTile % (kGroup * kLanes) == 0);

// to = or += from, plus `sign` times each of the parts. All may be read and written up to a multiple of the group.
template <int sign>
inline void add_parts(const float* from, const float* const* parts /* [count] */, int count, int width, bool accumulate,
                      float* to) {
  for (int v = 0; v < width; v += kGroup * kLanes) {
    Vec x[kGroup];
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; ++j) {
      x[j] = load(from + v + j * kLanes);
      if (accumulate) x[j] = load(to + v + j * kLanes) + x[j];
    }
    for (int i = 0; i < count; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; ++j) {
        const Vec part = load(parts[i] + v + j * kLanes);
        x[j] = sign > 0 ? x[j] + part : x[j] - part;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; ++j) store(to + v + j * kLanes, x[j]);
  }
}

// z [1 + draws, kTile] of one row = or += the sum of its partial products, then that under each draw's mask: adds the
// kept ones, or subtracts the dropped ones from the sum, whichever are fewer.
inline void combine(const float* partial /* [blocks, kPlane] */, int64_t blocks, const bool* keep /* [draws, stride] */,
                    int64_t stride, int draws, int width, bool accumulate, float* z) {
  alignas(64) static constexpr float kZeros[kTile] = {};
  alignas(64) float here[kTile];
  float* all = accumulate ? here : z;
  for (int v = 0; v < width; v += kLanes) store(all + v, sum_blocks(partial + v, blocks));
  if (accumulate) add_parts<1>(all, nullptr, 0, width, true, z);
  for (int k = 0; k < draws; ++k) {
    const bool* kept = keep + k * stride;
    int64_t kept_count = 0;
    for (int64_t b = 0; b < blocks; ++b) kept_count += kept[b];
    const bool most = 2 * kept_count > blocks;
    const float* parts[kDepth];  // written for every block, so that there is no branch to predict
    int count = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      parts[count] = partial + b * kPlane;
      count += kept[b] != most;
    }
    float* to = z + (1 + k) * kTile;
    if (most) {
      add_parts<-1>(all, parts, count, width, accumulate, to);
    } else {
      add_parts<1>(kZeros, parts, count, width, accumulate, to);
    }
  }
}

}  // namespace acqcore::ACQCORE_ISA
