// Folds logits into the state of a row (the algebra of row_stats.py).
//
// Sums run in float32 lanes, relative to the largest logit so far, and exclude that logit's own term. They are scaled
// by 2^40 (squares by 2^80), which costs nothing and keeps e^2 clear of subnormals down to e = 1e-31.
#pragma once
#include <math.h>

#include "simd.h"

namespace acqcore::ACQCORE_ISA {

constexpr int kShift = 40;
constexpr float kTerm = 0x1p40f;     // the term of a logit equal to the maximum
constexpr float kTermSq = 0x1p80f;   // its square
constexpr float kLowest = -110.0f;   // below this, exp (1e-48) is rounded to 0

// A row's sums over one stretch of the vocabulary, in lanes. kStretch bounds the stretch so that float32 suffices.
struct LaneState {
  Vec r, s1, s2, s11;  // scaled sums over all logits except the maximum
  Vec second;          // lane-wise largest of all logits except the maximum
  int64_t index;       // of the maximum
  float max;
  float target;
};

constexpr int64_t kStretch = 8192;
constexpr int64_t kFoldSplits = 32;  // splits of a vocabulary that a block folds one after another, for the same reason

// The state of a row in float64, unscaled.
struct RowState {
  double r, s1, s2, s11;
  int64_t index;
  float max, second, target;
};

inline void clear(LaneState& s) {
  s.r = s.s1 = s.s2 = s.s11 = Vec{};
  s.max = s.target = -INFINITY;
  s.second = broadcast(-INFINITY);
  s.index = -1;
}

inline void clear(RowState& s) { s = {0, 0, 0, 0, -1, -INFINITY, -INFINITY, -INFINITY}; }

// Adds the terms of z[0, n), relative to `max`, except that of z[skip], the maximum itself, unless `skip` is negative.
// With kKeep, `terms` receives exp(z - max) 2^40, and 0 for the maximum.
template <bool kKeep>
inline void add_terms(const float* z, int n, float max, int skip, LaneState& s, float* terms /* [n] */) {
  Vec r{}, s1{}, s2{}, s11{};  // summed separately and added once, so that small terms are not lost in large sums
  const auto add = [&](Vec x, int i) {
    const Vec e = exp_above<kShift>(x, kLowest);
    if constexpr (kKeep) store(terms + i, e);
    const Vec ex = e * x;
    r += e;
    s1 += ex;
    s2 += e * e;
    s11 += ex * x;
  };
  int i = 0;
  if (skip >= 0) {
    for (; i + kLanes <= skip; i += kLanes) add(load(z + i) - max, i);
    add(without(load(z + i) - max, skip - i), i);
    i += kLanes;
  }
  for (; i < n; i += kLanes) add(load(z + i) - max, i);
  s.r += r + s1 * 0.0f;  // exp_above may lose a NaN; s1 = e x propagates it
  s.s1 += s1;
  s.s2 += s2;
  s.s11 += s11;
}

// Rebases the sums to a new maximum; the old maximum joins them as a term.
inline void rescale(LaneState& s, float max) {
  if (s.max == -INFINITY) {
    s.max = max;
    return;
  }
  const float d = s.max - max;
  const float c = expf(d);
  s.s11 = (s.s11 + s.s1 * (2 * d) + s.r * (d * d)) * c;
  s.s1 = (s.s1 + s.r * d) * c;
  s.r *= c;
  s.s2 = s.s2 * c * c;
  const float term = kTerm * c;
  s.r[0] += term;
  s.s1[0] += term * d;
  s.s11[0] += term * d * d;
  s.s2[0] += term * term;
  s.second[0] = s.max;  // at least as large as any second so far
  s.max = max;
}

// Folds logits z[0, n), the first of which has vocabulary index `base`. n is a multiple of kLanes; -inf marks an absent
// token. With kKeep, `terms` [n] receives exp(z - s.max) 2^40, where s.max is the maximum after the call.
template <bool kKeep = false>
inline void fold(const float* z, int n, int64_t base, LaneState& s, float* terms = nullptr) {
  Vec top = load(z);
  for (int i = kLanes; i < n; i += kLanes) top = maximum(load(z + i), top);
  const float max = horizontal_max(top);
  if (!(max > s.max)) {
    if (max == -INFINITY && s.max == -INFINITY) {  // nothing finite yet: only a NaN matters
      for (int i = 0; i < n; ++i)
        if (z[i] != z[i]) s.r[0] = z[i];
      if constexpr (kKeep) memset(terms, 0, 4 * n);
      return;
    }
    s.second = maximum(top, s.second);
    add_terms<kKeep>(z, n, s.max, -1, s, terms);
    return;
  }
  const int a = first_equal(z, max);
  rescale(s, max);
  s.index = base + a;
  int i = 0;
  for (; i + kLanes <= a; i += kLanes) s.second = maximum(load(z + i), s.second);
  s.second = maximum(without(load(z + i), a - i), s.second);
  for (i += kLanes; i < n; i += kLanes) s.second = maximum(load(z + i), s.second);
  add_terms<kKeep>(z, n, max, a, s, terms);
  if constexpr (kKeep) terms[a] = kTerm;
}

inline RowState reduce(const LaneState& s) {
  return {horizontal_sum(s.r) * 0x1p-40,
          horizontal_sum(s.s1) * 0x1p-40,
          horizontal_sum(s.s2) * 0x1p-80,
          horizontal_sum(s.s11) * 0x1p-40,
          s.index,
          s.max,
          horizontal_max(s.second),
          s.target};
}

// Merges a later stretch of the vocabulary into `s`; the earlier index wins ties. Not inlined, so that all operations
// round alike: inlining affects which sums become fused multiply-adds.
__attribute__((noinline)) inline void merge(RowState& s, const RowState& later) {
  const bool swap = later.max > s.max;
  const RowState high = swap ? later : s;
  const RowState low = swap ? s : later;
  s = high;
  s.target = low.target > high.target ? low.target : high.target;
  if (low.max == -INFINITY) {
    s.r += low.r;  // 0, or NaN
    return;
  }
  const double d = double(low.max) - double(high.max);
  const double c = exp(d);
  const double n = low.r + 1;  // includes the term of the lower maximum
  s.s11 += c * (low.s11 + 2 * d * low.s1 + d * d * n);
  s.s1 += c * (low.s1 + d * n);
  s.s2 += c * c * (low.s2 + 1);
  s.r += c * n;
  s.second = low.max > high.second ? low.max : high.second;
}

// Writes a row's state, or NaN if `s` is null (an ignored row).
inline void write_state(const RowState* s, int64_t row, int64_t rows, double* state /* [7, rows] */,
                        int64_t* index /* [rows] */) {
  const double nan = NAN;
  const double values[7] = {s ? s->max : nan, s ? s->second : nan, s ? s->r : nan,     s ? s->s1 : nan,
                            s ? s->s2 : nan,  s ? s->s11 : nan,    s ? s->target : nan};
  for (int i = 0; i < 7; ++i) state[i * rows + row] = values[i];
  index[row] = s ? s->index : -1;
}

}  // namespace acqcore::ACQCORE_ISA
