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

// to = from + sign part.
template <int sign>
inline void add(const float* from, const float* part, int width, float* to) {
  for (int v = 0; v < width; v += kLanes) {
    const Vec x = load(part + v);
    store(to + v, sign > 0 ? load(from + v) + x : load(from + v) - x);
  }
}

// z [1 + draws, kTile] of one row = or += the sum of its partial products, then that under each draw's mask: adds the
// kept ones, or subtracts the dropped ones from the sum, whichever are fewer.
inline void combine(const float* partial /* [blocks, kPlane] */, int64_t blocks, const bool* keep /* [draws, stride] */,
                    int64_t stride, int draws, int width, bool accumulate, float* z) {
  alignas(64) static constexpr float kZeros[kTile] = {};
  alignas(64) float here[kTile];
  float* all = accumulate ? here : z;
  for (int v = 0; v < width; v += kLanes) {
    Vec sums[4] = {};  // four short chains: with the subtractions, no less accurate than one long chain
    for (int64_t b = 0; b < blocks; ++b) sums[b % 4] += load(partial + b * kPlane + v);
    store(all + v, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  if (accumulate) add<1>(z, all, width, z);
  for (int k = 0; k < draws; ++k) {
    const bool* kept = keep + k * stride;
    float* to = z + (1 + k) * kTile;
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; ++b) count += kept[b];
    const bool most = 2 * count > blocks;
    const float* from = most ? all : kZeros;
    if (accumulate) {
      add<1>(to, from, width, to);
      from = to;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      if (kept[b] == most) continue;
      if (most) {
        add<-1>(from, partial + b * kPlane, width, to);
      } else {
        add<1>(from, partial + b * kPlane, width, to);
      }
      from = to;
    }
    if (from != to) memcpy(to, from, 4 * kTile);
  }
}

}  // namespace acqcore::ACQCORE_ISA
