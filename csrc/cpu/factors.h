// Folds a tile and produces its factors exp(z - m) cap' 2^40, for unnormalized sums over the vocabulary. The reference
// m is the largest logit so far; sums are rescaled when it rises.
#pragma once
#include <math.h>

#include "fold.h"
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

}  // namespace acqcore::ACQCORE_ISA
