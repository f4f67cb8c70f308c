// Per-sample Gram matrices of unnormalized probabilities, G_st = sum_v f_s[v] f_t[v], computed alongside the fold.
//
// Every term is positive and relative to the rows' largest logits so far, so float32 sums suffice; rows and columns are
// rescaled when a maximum rises. Only blocks on and above the diagonal are stored. For short samples vectors run along
// the vocabulary: the fold's factors are multiplied without packing, and 16 sums at a time are reduced by a tree of
// shuffles. For longer ones they run along packed columns, as in the product. Tile registers multiply factors split into
// two bfloat16 and accumulate into the Gram in place.
#pragma once
#include <math.h>
#include <stdlib.h>

#include "fold.h"
#include "tile.h"

namespace acqcore::ACQCORE_ISA {

constexpr int kGramColumns = 4;  // rows and columns per vector block

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kGramRows = 4;  // 16 accumulators in 32 registers
#else
constexpr int kGramRows = 2;  // 8 in 16
#endif

constexpr int kGramStripe = 16;  // rows of factors that stay in L1: 24 KiB with AVX-512

// Up to this many rows vectors multiply a sample's factors, above it tile registers. With a bfloat16 product, shorter
// samples would leave the tiles mostly empty. With a float32 product, the taller panels cost the product 4 %: statistics
// with the Gram take 1.20 times as long as without at 128 rows (1.17 with vectors), 1.35 at 256 (1.35), 1.4 at 512 (1.7)
// and 2.6 at 2048 (4.4; one core of a Xeon, D = 576).
inline int64_t longest_vector_gram(bool pairs) { return pairs ? kPanelRows / 2 : 256; }

// Up to this many rows, vectors run along the vocabulary. Statistics with a Gram of 512 rows take 1.50 times as long as
// those without if columns are packed, else 1.68 times; of 2048 rows 3.0 or 3.9 times; of 64 rows 1.10 times either way
// (AVX2, D = 576). AVX-512 does not pack: its vectors would hold 48 columns, of which the diagonal wastes more.
#if defined(__AVX512F__)
constexpr int64_t kLongestUnpacked = INT64_MAX;
#else
constexpr int64_t kLongestUnpacked = 64;
#endif

constexpr int kPackedSide = 48;  // the longest side of all layouts
static_assert(kPackedSide % kVectorRows == 0 && kPackedSide % kPanelColumns == 0 && kPanelRows < kPackedSide);

// Layout of a sample's triangle: blocks of `side` rows and columns on and above the diagonal.
struct GramLayout {
  int64_t rows, side, padded;  // padded: the sample's rows, rounded up to whole blocks

  GramLayout(int64_t rows, bool pairs)
      : rows(rows),
        side(kHasTiles && rows > longest_vector_gram(pairs) ? kPanelRows
             : rows > kLongestUnpacked                      ? kPackedSide
                                                            : kGramColumns),
        padded(ceil_div(rows, side) * side) {}

  bool tiled() const { return side == kPanelRows; }
  bool packed() const { return side == kPackedSide; }

  // Offset of the blocks of rows [row, row + side), stored as [side, padded - row].
  int64_t offset(int64_t row) const { return row * padded - row * (row - side) / 2; }

  int64_t elements() const { return offset(padded); }

  // Offset of a row: entry (row, column) of the triangle is at row(row) + column.
  int64_t row(int64_t row) const {
    const int64_t block = row / side * side;
    return offset(block) + (row - block) * (padded - block) - block;
  }

  // Floats of scratch for add_to_gram: split factors, as rows and as columns, or packed columns.
  int64_t scratch() const { return tiled() ? 4 * padded * (kTile / 2) : packed() ? padded * kTile : 0; }
};

// out [kGramRows, stride] += left right^T over n columns.
inline void gram_block(const float* left /* [kGramRows, kTile] */, const float* right /* [kGramColumns, kTile] */,
                       int n, float* out, int64_t stride) {
  Vec c[kGramRows * kGramColumns] = {};
  for (int k = 0; k < n; k += kLanes) {
    Vec r[kGramColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kGramColumns; ++j) r[j] = load(right + j * kTile + k);
#pragma GCC unroll 4
    for (int i = 0; i < kGramRows; ++i) {
      const Vec l = load(left + i * kTile + k);
#pragma GCC unroll 4
      for (int j = 0; j < kGramColumns; ++j) c[i * kGramColumns + j] += l * r[j];
    }
  }
  float sums[kGramRows * kGramColumns];
#pragma GCC unroll 4
  for (int first = 0; first < kGramRows * kGramColumns; first += kLanes) store(sums + first, horizontal_sums(c + first));
#pragma GCC unroll 4
  for (int i = 0; i < kGramRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kGramColumns; ++j) out[i * stride + j] += sums[i * kGramColumns + j];
  }
}

// add_to_gram in tile registers; scratch is [panels, 4, kTile / 2, kPanelRows].
inline void add_to_gram_by_tiles(const float* factors /* [padded, kTile] */, const GramLayout& layout, int n,
                                 float* gram, float* scratch) {
  const int64_t padded = layout.padded;
  constexpr int64_t kPart = kTile / 2 * kPanelRows;
  const int64_t units = ceil_div(n, 2 * kTileUnits) * kTileUnits;
  for (int64_t t = 0; t < padded; t += kPanelRows) {
    float* parts = scratch + t / kPanelRows * 4 * kPart;
    split_panel(factors + t * kTile, kTile, n, parts, parts + kPart);
    transpose_panel(parts, units, parts + 2 * kPart);
    transpose_panel(parts + kPart, units, parts + 3 * kPart);
  }
  constexpr int64_t kStripe = 4 * kPanelRows;  // rows kept in L2 while the others stream by: 192 KiB
  for (int64_t stripe = 0; stripe < padded; stripe += kStripe) {
    for (int64_t t = stripe; t < padded; t += kPanelRows) {
      const float* right = scratch + t / kPanelRows * 4 * kPart + 2 * kPart;
      for (int64_t s = stripe; s < lesser(stripe + kStripe, t + kPanelRows); s += kPanelRows) {
        const float* left = scratch + s / kPanelRows * 4 * kPart;
        tile_gram(left, left + kPart, right, right + kPart, units, gram + layout.offset(s) + t - s, padded - s);
      }
    }
  }
}

// add_to_gram with vectors along packed columns; scratch is [padded / kPanelColumns, kTile, kPanelColumns]. A block of
// rows stays in L1 while the columns stream by, and its part of the Gram is walked along rows of memory.
inline void add_to_gram_by_panels(const float* factors /* [padded, kTile] */, const GramLayout& layout, int n,
                                  float* gram, float* scratch) {
  const Matrix all{factors, layout.padded, n, kTile, 1, DType::kFloat32};
  for (int64_t t = 0; t < layout.rows; t += kPanelColumns) {
    pack_panel(all, nullptr, t, kPanelColumns, kPanelColumns, false, 0, n, scratch + t * kTile);
  }
  for (int64_t block = 0; block < layout.rows; block += kPackedSide) {
    for (int64_t t = block; t < layout.rows; t += kPanelColumns) {
      const int64_t last = lesser(lesser(block + kPackedSide, t + kPanelColumns), layout.rows);
      for (int64_t s = block; s < last; s += kVectorRows) {
        vector_product<false, ByRows<kTile>>(factors + s * kTile, scratch + t * kTile, n, true,
                                             gram + layout.row(s) + t, layout.padded - block, nullptr);
      }
    }
  }
}

// gram += factors factors^T over a tile of n columns. A stripe of rows stays in L1 while the others stream from L2.
inline void add_to_gram(const float* factors /* [padded, kTile] */, const GramLayout& layout, int n, float* gram,
                        float* scratch) {
  if (layout.tiled()) {
    add_to_gram_by_tiles(factors, layout, n, gram, scratch);
    return;
  }
  if (layout.packed()) {
    add_to_gram_by_panels(factors, layout, n, gram, scratch);
    return;
  }
  const int64_t padded = layout.padded;
  for (int64_t stripe = 0; stripe < padded; stripe += kGramStripe) {
    for (int64_t t = stripe; t < padded; t += kGramColumns) {
      for (int64_t s = stripe; s < lesser(stripe + kGramStripe, t + kGramColumns); s += kGramColumns) {
        const int64_t stride = padded - s;
        float* out = gram + layout.offset(s) + (t - s);
        for (int i = 0; i < kGramColumns; i += kGramRows) {
          gram_block(factors + (s + i) * kTile, factors + t * kTile, n, out + i * stride, stride);
        }
      }
    }
  }
}

inline int ascending(const void* a, const void* b) {
  const int64_t x = *static_cast<const int64_t*>(a), y = *static_cast<const int64_t*>(b);
  return x < y ? -1 : x > y;
}

// Sorts the columns, removes duplicates and returns the number left.
inline int64_t sort_distinct(int64_t* columns, int64_t count) {
  qsort(columns, count, sizeof(int64_t), ascending);
  int64_t distinct = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (distinct == 0 || columns[i] != columns[distinct - 1]) columns[distinct++] = columns[i];
  }
  return distinct;
}

// Index of the first of the ascending columns that is at least `least`.
inline int64_t lower_bound(const int64_t* columns, int64_t count, int64_t least) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (columns[middle] < least) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Scales the rows and columns of the Gram by `scale` [padded].
inline void rescale_gram(const float* scale, const GramLayout& layout, float* gram) {
  for (int64_t s = 0; s < layout.padded; ++s) {
    float* row = gram + layout.row(s);
    for (int64_t t = s / layout.side * layout.side; t < layout.padded; ++t) row[t] *= scale[s] * scale[t];
  }
}

}  // namespace acqcore::ACQCORE_ISA
