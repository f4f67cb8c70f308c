// Folds a tile and produces its factors exp(z - m) cap' 2^40, for unnormalized sums over the vocabulary. The reference
// m is the largest logit so far; sums are rescaled when it rises.
#pragma once
#include <math.h>

#include "fold.h"
#include "parallel.h"
#include "tile.h"

namespace acqcore::ACQCORE_ISA {

// Folds z[0, n) and writes its factors; `factors` may be z if there is no softcap. The reference outlives `lanes`,
// which restart with each split. Returns the factor for sums relative to the previous reference.
inline float fold_factors(const Transform& transform, const float* z, int n, int64_t base, LaneState& lanes,
                          float& reference, float* factors /* [n] */) {
  fold<true>(z, n, base, lanes, factors);
  float scale = 1, factor = 1;
  if (lanes.max > reference) {
    scale = reference == -INFINITY ? 0 : expf(reference - lanes.max);
    reference = lanes.max;
  } else if (lanes.max < reference) {
    factor = expf(lanes.max - reference);
  }
  if (transform.capped) {
    const float inverse = 1 / transform.after;  // z * inverse = tanh
    for (int i = 0; i < n; i += kLanes) {
      const Vec f = load(factors + i);
      const Vec t = load(z + i) * inverse;
      store(factors + i, f == 0 ? Vec{} : f * (factor * (1.0f - t * t)));  // a padding logit is -inf
    }
  } else if (factor != 1) {
    for (int i = 0; i < n; i += kLanes) store(factors + i, load(factors + i) * factor);
  }
  return scale;
}

// Sums over the vocabulary that belong to a block of rows, relative to the rows' references, times 2^40.
struct RowSums {
  int64_t columns;
  float* sums;  // [count, columns]

  float* of(int64_t row) const { return sums + row * columns; }

  void rescale(int64_t row, float scale) const {
    for (int64_t j = 0; j < columns; ++j) of(row)[j] *= scale;
  }
};

// A block of rows that are folded while their factors are added to sums.
struct FoldedRows {
  const int64_t* rows;  // row numbers
  int64_t count;
  RowSums values;       // of factors times values
  RowSums hashed;       // of factors, by place
  float* references;    // [count]
  LaneState* lanes;     // [count]
  RowState* states;     // [count]
};

// Folds the products z [kTile] of row i with a tile and turns them into factors, in place; the target's is 0. Rescales
// the row's sums, and returns the factor.
inline float fold_row(const HeadArgs& head, const Transform& transform, const FoldedRows& folded, int64_t i, int64_t tile,
                     int width, float* z) {
  const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
  float copy[kTile];  // the logits, needed for the cap's derivative
  transform(z, width, tile);
  const int64_t target = head.targets[folded.rows[i]] - head.vocab_start - tile;
  const bool here = target >= 0 && target < width;
  if (here) folded.lanes[i].target = z[target];
  const float* logits = transform.capped ? static_cast<float*>(memcpy(copy, z, 4 * n)) : z;
  const float scale =
      fold_factors(transform, logits, n, head.vocab_start + tile, folded.lanes[i], folded.references[i], z);
  if (here) z[target] = 0;
  if (scale != 1) {
    folded.values.rescale(i, scale);
    folded.hashed.rescale(i, scale);
  }
  return scale;
}

// For every tile of the vocabulary calls add_tile(tile, width), which must call fold_row for every row and add the
// factors to the sums; then writes the rows' states.
template <typename AddTile>
inline void fold_block(const HeadArgs& head, const FoldedRows& folded, double* state /* [7, N] */,
                       int64_t* index /* [N] */, const AddTile& add_tile) {
  const int64_t vocabulary = head.weight.rows;
  const int64_t split_columns = ceil_div(ceil_div(vocabulary, kTile), kFoldSplits) * kTile;
  for (int64_t i = 0; i < folded.count; ++i) {
    clear(folded.states[i]);
    folded.references[i] = -INFINITY;
  }
  for (int64_t first = 0; first < vocabulary; first += split_columns) {
    const int64_t last = lesser(first + split_columns, vocabulary);
    for (int64_t i = 0; i < folded.count; ++i) clear(folded.lanes[i]);
    for (int64_t tile = first; tile < last; tile += kTile) {
      add_tile(tile, static_cast<int>(lesser(kTile, last - tile)));
    }
    for (int64_t i = 0; i < folded.count; ++i) merge(folded.states[i], reduce(folded.lanes[i]));
  }
  for (int64_t i = 0; i < folded.count; ++i) {
    write_state(folded.states + i, folded.rows[i], head.hidden.rows, state, index);
  }
}

}  // namespace acqcore::ACQCORE_ISA
