// Gradient of each token's loss with respect to W h + b (delta of head_grad.py), tile by tile, from the row's state.
#pragma once
#include "fold.h"
#include "tile.h"

namespace acqcore::ACQCORE_ISA {

// Per-row constants of delta_v = weight slope_v (exp(z_v - max) / Z - [v = target]).
struct DeltaRow {
  float max;
  float term;       // weight slope / (2^40 Z), for exp_above<40>
  float slope;      // weight scale / temperature
  float at_target;  // p_y - 1, computed as -R / Z if the target is the maximum
  int64_t target;   // column in this weight, or negative
};

inline DeltaRow delta_row(const HeadArgs& args, const double* state /* [7, N] */, const int64_t* index /* [N] */,
                          int64_t row, double weight) {
  const int64_t n = args.hidden.rows;
  const double max = state[row], target = state[6 * n + row];
  const double r = state[2 * n + row] + 0 * max;  // an infinite maximum, whose sums are finite, makes delta NaN
  const double slope = weight * args.scale / args.temperature;
  const bool top = args.targets[row] == index[row];
  return {static_cast<float>(max), static_cast<float>(slope / (1 + r) * 0x1p-40), static_cast<float>(slope),
          static_cast<float>(top ? -r / (1 + r) : exp(target - max) / (1 + r) - 1),
          args.targets[row] - args.vocab_start};
}

// Turns z[0, width) into delta in place; pads the last vector with zeros. `tile` is the column of z[0].
inline void to_delta(const DeltaRow& row, const Transform& transform, int64_t tile, int width, float* z) {
  const int64_t target = row.target - tile;
  const bool here = target >= 0 && target < width;
  const float at_target = here && transform.capped ? z[target] : 0;  // -inf times 0 would be NaN without a softcap
  const float inverse = transform.capped ? 1 / transform.after : 0;  // z * inverse = tanh
  for (int i = 0; i < width; i += kLanes) {
    const Vec logits = load(z + i);
    Vec x = logits - row.max;
    Vec delta = exp_above<kShift>(x, kLowest) * row.term;
    if (transform.capped) {
      const Vec t = logits * inverse;
      delta = delta == 0 ? Vec{} : delta * (1.0f - t * t);  // t is not finite for an absent logit
    }
    store(z + i, delta);
  }
  if (here) {
    const float t = at_target * inverse;
    z[target] = row.at_target * row.slope * (1 - t * t);
  }
}

// A row that pads a panel, with zero delta.
inline DeltaRow padding_row() { return {INFINITY, 0, 0, 0, -1}; }

// Computes delta [rows, kTile] of one tile. `rows` is a multiple of kPanelRows.
inline void delta_tile(const HeadArgs& args, const Inner& inner, const Transform& transform, const DeltaRow* delta_rows,
                       int64_t rows, const float* hidden /* packed panels */, int64_t tile, int width,
                       float* weights /* [kTile, depth] */, float* delta /* [rows, kTile] */) {
  multiply_tile(args, inner, hidden, rows, tile, width, weights, delta);
  for (int64_t i = 0; i < rows; ++i) {
    transform(delta + i * kTile, width, tile);
    to_delta(delta_rows[i], transform, tile, width, delta + i * kTile);
  }
}

}  // namespace acqcore::ACQCORE_ISA
