// The algebra of row_stats.py on a GPU: logits -> a lane's sums -> a group's state (32 lanes) -> the row's state.
//
// A lane keeps the largest logit so far apart from its sums. Each new logit competes with it, and the loser's term,
// relative to the winner, is added. The maximum's own term never enters a sum, which keeps confident rows exact and
// makes the position of maxima nearly irrelevant to the cost. Lanes work in float32 on the raw logits, with sums scaled
// by 2^40 (squares by 2^80), which keeps e^2 clear of flushed subnormals down to e = 1e-31. The temperature is part of
// the exponential's rate; quantities linear in the logits are divided by it once per row, in float64.
#pragma once
#include <float.h>

#include "words.cuh"

namespace acqcore::cuda {

constexpr float kTermLog2 = 40.0f;      // log2 of the term of a logit equal to the maximum
constexpr double kUnscale = 0x1p-40;

// exp((z - m) / temperature) = 2^(rate (z - m)). z - m is clamped to `floor`, where the result is 0.
struct Exponential {
  float rate;   // log2(e) / temperature
  float floor;  // -170 / rate: 2^(40 - 170) is flushed to 0
};

template <typename Real>
struct Sums {
  Real r, s1, s2, s11;  // of e, e x, e^2, e x^2 with x = z - max <= 0
};

template <typename Real>
ACQCORE_DEVICE void add(Sums<Real>& s, const Sums<Real>& other) {
  s.r += other.r;
  s.s1 += other.s1;
  s.s2 += other.s2;
  s.s11 += other.s11;
}

// Adds the term `e` of a logit `x` below the maximum.
template <typename Real>
ACQCORE_DEVICE void add_term(Sums<Real>& s, Real e, Real x) {
  const Real ex = e * x;
  s.r += e;
  s.s1 += ex;
  s.s2 += e * e;
  s.s11 += ex * x;
}

// Rebases sums to a maximum that is higher by -d; c = exp(d).
template <typename Real>
ACQCORE_DEVICE void rebase(Sums<Real>& s, Real c, Real d) {
  s.s11 = (s.s11 + 2 * d * s.s1 + d * d * s.r) * c;
  s.s1 = (s.s1 + d * s.r) * c;
  s.s2 *= c * c;
  s.r *= c;
}

// A lane's state over the logits it has folded.
template <DType dtype>
struct Lane {
  Sums<float> sums;  // scaled; over all but `best`
  uint32_t best;     // word: the largest logits of even and of odd columns
  uint32_t second;   // word: upper bounds of the logits in the sums
  float max;         // of the logits in `best`
  uint32_t chunk;    // where max first occurred
};

template <DType dtype>
ACQCORE_DEVICE Lane<dtype> empty_lane() {
  return {{0, 0, 0, 0}, Words<dtype>::kAbsent, Words<dtype>::kAbsent, -INFINITY, 0};
}

// The sums' reference: max, but finite even without a finite logit so far, which avoids -inf - -inf.
ACQCORE_DEVICE float reference_of(float max) { return fmaxf(max, -FLT_MAX); }

ACQCORE_DEVICE void add_logit(Sums<float>& s, float z, float reference, const Exponential& exponential) {
  const float x = maximum_or_nan(z - reference, exponential.floor);
  add_term(s, exp2_flushed(fmaf(x, exponential.rate, kTermLog2)), x);
}

// Rebases a lane's sums to the larger maximum `max`.
template <DType dtype>
ACQCORE_DEVICE void raise(Lane<dtype>& lane, float max, const Exponential& exponential) {
  const float d = fmaxf(reference_of(lane.max) - max, exponential.floor);
  rebase(lane.sums, exp2_flushed(d * exponential.rate), d);
  lane.max = max;
}

template <DType dtype>
ACQCORE_DEVICE float largest(uint32_t word) {
  const float first = Words<dtype>::get(word, 0);
  return Words<dtype>::kPer == 1 ? first : fmaxf(first, Words<dtype>::get(word, 1));
}

// Folds the words of one chunk into a lane and overwrites them.
//
// Instructions per bfloat16 logit: 1.5 for the competition (three per word), 1 to widen, 1 subtraction, 1 clamp, 1 fma,
// 1 exp2, 5 for the sums: 11.5. As compiled for sm_90, with loads and raising: 12.7, and 1.3 to reduce the group. An
// H100 at 1.7 GHz issues 132 multiprocessors x 128 lanes x 1.7e9 = 29e12 lane instructions per second, 19 per logit at
// 3.0 TB/s (1.5e12 logits/s), and its exp2 units sustain 2.4 times that rate: memory-bound. float32 may use 38.
template <DType dtype, int n>
ACQCORE_DEVICE void fold_words(uint32_t (&words)[n], uint32_t chunk, const Exponential& exponential,
                               Lane<dtype>& lane) {
  ACQCORE_UNROLL
  for (int i = 0; i < n; ++i) {
    const uint32_t loser = smaller_or_nan<dtype>(lane.best, words[i]);
    lane.best = larger<dtype>(lane.best, words[i]);
    lane.second = larger<dtype>(lane.second, loser);
    words[i] = loser;
  }
  const float max = largest<dtype>(lane.best);
  if (max > lane.max) {
    raise(lane, max, exponential);
    lane.chunk = chunk;
  }
  const float reference = reference_of(lane.max);
  ACQCORE_UNROLL
  for (int i = 0; i < n; ++i) {
    ACQCORE_UNROLL
    for (int half = 0; half < Words<dtype>::kPer; ++half) {
      add_logit(lane.sums, Words<dtype>::get(words[i], half), reference, exponential);
    }
  }
}

// The state of a group, the part of a row that one warp folds. 32 bytes.
struct GroupState {
  float max, second;
  Sums<float> sums;  // scaled
  uint32_t chunk;    // the first chunk that holds max
  uint32_t lanes;    // bit i: lane i first met max in that chunk
};

// Reduces the lanes of a warp to the state of their group, returned in every lane.
template <DType dtype>
ACQCORE_DEVICE GroupState reduce(Lane<dtype> (&lanes)[kHeld], const Exponential& exponential) {
  const auto greater = [](float a, float b) { return b > a ? b : a; };
  const auto lesser = [](uint32_t a, uint32_t b) { return b < a ? b : a; };
  const auto plus = [](float a, float b) { return a + b; };
  float max[kHeld], second[kHeld], r[kHeld], s1[kHeld], s2[kHeld], s11[kHeld];
  uint32_t chunk[kHeld];
  bool at_max[kHeld];
  for (int i = 0; i < kHeld; ++i) {
    Lane<dtype>& lane = lanes[i];
    second[i] = largest<dtype>(lane.second);
    if constexpr (Words<dtype>::kPer == 2) {  // the smaller of the two kept logits joins the sums
      const float other = fminf(Words<dtype>::get(lane.best, 0), Words<dtype>::get(lane.best, 1));
      add_logit(lane.sums, other, reference_of(lane.max), exponential);
      second[i] = greater(second[i], other);
    }
    max[i] = lane.max;
  }
  butterfly(max, greater);
  for (int i = 0; i < kHeld; ++i) at_max[i] = lanes[i].max == max[i];
  const int owner = lowest_bit(ballot(at_max));
  for (int i = 0; i < kHeld; ++i) {
    Lane<dtype>& lane = lanes[i];
    const float own = lane.max;
    chunk[i] = at_max[i] ? lane.chunk : ~0u;
    if (own > -INFINITY && lane_of(i) != owner) {
      raise(lane, max[i], exponential);
      add_logit(lane.sums, own, max[i], exponential);
      second[i] = greater(second[i], own);
    }
    r[i] = lane.sums.r;
    s1[i] = lane.sums.s1;
    s2[i] = lane.sums.s2;
    s11[i] = lane.sums.s11;
  }
  butterfly(chunk, lesser);
  for (int i = 0; i < kHeld; ++i) at_max[i] = at_max[i] && lanes[i].chunk == chunk[i];
  const uint32_t where = ballot(at_max);
  butterfly(second, greater);
  butterfly(r, plus);
  butterfly(s1, plus);
  butterfly(s2, plus);
  butterfly(s11, plus);
  return {max[0], second[0], {r[0], s1[0], s2[0], s11[0]}, chunk[0], where};
}

// The state of a row over all or part of the vocabulary, unscaled, with logits divided by the temperature.
struct RowState {
  double max, second, target;
  Sums<double> sums;
  int64_t index;
};

// Merges a later part of the vocabulary into `s`; the earlier index wins ties.
ACQCORE_DEVICE void merge(RowState& s, const RowState& later) {
  const bool swap = later.max > s.max;
  RowState low = swap ? s : later;
  if (swap) s = later;
  s.target = fmax(s.target, low.target);
  if (low.max == -INFINITY) {
    s.sums.r += low.sums.r;  // 0, or NaN
    return;
  }
  const double d = low.max - s.max;
  const double c = exp(d);
  rebase(low.sums, c, d);
  add(s.sums, low.sums);
  add_term(s.sums, c, d);  // the term of the lower maximum
  s.second = fmax(s.second, low.max);
}

}  // namespace acqcore::cuda
