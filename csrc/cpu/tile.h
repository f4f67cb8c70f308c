// Tiles of the vocabulary: packing and multiplying a head's weights, and turning products into logits.
#pragma once
#include <math.h>

#include "isa.h"
#include "product.h"

namespace acqcore::ACQCORE_ISA {

constexpr int kTile = 8 * kPanelColumns;  // columns per tile
constexpr int kPlane = kPanelRows * kTile + 2 * kLanes;  // a panel's products with a tile, padded against aliasing
constexpr int64_t kDepth = 640;           // inner units packed at a time, so that a tile's weights stay in L2

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// The inner dimension of hidden W^T, in 4-byte units.
struct Inner {
  int64_t units;
  int64_t depth;  // units packed at a time
  bool pairs;     // a unit is two bfloat16
};

inline Inner inner_dimension(const HeadArgs& args) {
  Inner inner;
  inner.pairs = kHasBf16Product && args.hidden.dtype == DType::kBFloat16 && args.weight.dtype == DType::kBFloat16;
  inner.units = ceil_div(inner.pairs ? ceil_div(args.hidden.columns, 2) : args.hidden.columns, kRun) * kRun;
  const int64_t parts = greater(1, ceil_div(inner.units, kDepth));
  // Whole runs for every instruction set, since the cut affects how sums round.
  inner.depth = ceil_div(ceil_div(greater(1, inner.units), parts), kTileUnits) * kTileUnits;
  return inner;
}

// Packs units [k0, k0 + k) of weights [tile, tile + width) as consecutive panels [depth, kPanelColumns].
inline void pack_weights(const Matrix& weight, const Inner& inner, int64_t tile, int width, int64_t k0, int64_t k,
                         float* out /* [kTile / kPanelColumns, depth, kPanelColumns] */) {
  for (int j = 0; j < width; j += kPanelColumns) {
    const int count = static_cast<int>(lesser(kPanelColumns, width - j));
    pack_panel(weight, nullptr, tile + j, count, kPanelColumns, inner.pairs, k0, k, out + j * inner.depth);
  }
}

// A panel of rows times a packed tile: out [kPanelRows, kTile] = or +=. Meanwhile fetches the next panel of rows.
inline void multiply_panel(const Inner& inner, const float* a /* [k, kPanelRows] */, const float* weights, int width,
                           int64_t k, bool accumulate, float* out) {
  for (int j = 0; j < width; j += kPanelColumns) {
    const float* b = weights + j * inner.depth;
    const float* next = a + kPanelRows * (inner.units + k * j / kTile);
    if (inner.pairs) {
      panel_product<kHasBf16Product>(a, b, k, accumulate, out + j, kTile, next);
    } else {
      panel_product<false>(a, b, k, accumulate, out + j, kTile, next);
    }
  }
}

// Full-depth products of a block of packed panels with a tile: out [rows, kTile]. rows is a multiple of kPanelRows.
inline void multiply_tile(const HeadArgs& args, const Inner& inner, const float* hidden, int64_t rows, int64_t tile,
                          int width, float* weights /* [kTile, depth] */, float* out) {
  for (int64_t k0 = 0; k0 < inner.units || k0 == 0; k0 += inner.depth) {
    const int64_t k = lesser(inner.depth, inner.units - k0);
    pack_weights(args.weight, inner, tile, width, k0, k, weights);
    for (int64_t row = 0; row < rows; row += kPanelRows) {
      multiply_panel(inner, hidden + row * inner.units + k0 * kPanelRows, weights, width, k, k0 > 0, out + row * kTile);
    }
  }
}

// z = cap(scale (factor product + bias)) / temperature
struct Transform {
  float factor, before, cap_scale, after;
  const float* bias;
  bool identity, capped;

  explicit Transform(const HeadArgs& args, float product_factor = 1.0f)
      : factor(product_factor),
        before(args.softcap > 0 ? args.scale / args.softcap : args.scale / args.temperature),
        cap_scale(args.softcap),
        after(args.softcap / args.temperature),
        bias(args.bias),
        identity(args.softcap == 0 && args.bias == nullptr && before * factor == 1.0f),
        capped(args.softcap > 0) {}

  // In place on z[0, n), whose first entry is column `base` of this weight; pads the last vector with -inf.
  void operator()(float* z, int n, int64_t base) const {
    if (!identity) {
      if (bias) {
        for (int i = 0; i < n; ++i) z[i] = z[i] * factor + bias[base + i];
      }
      const float slope = bias ? before : before * factor;
      for (int i = 0; i < n; i += kLanes) {
        Vec x = load(z + i) * slope;
        if (capped) x = tanh(x) * after;
        store(z + i, x);
      }
    }
    for (int i = n; i % kLanes != 0; ++i) z[i] = -INFINITY;
  }
};

}  // namespace acqcore::ACQCORE_ISA
