// Statistics of the mean of K softmax rows, shared by the forms of mixture_stats.
#pragma once
#include "fold.h"
#include "isa.h"

namespace acqcore::ACQCORE_ISA {

constexpr int64_t kMaxSplits = 32;            // bounds the memory of the split states
constexpr int64_t kStateBytes = 16 << 20;     // limit on the states of all splits and draws
constexpr int64_t kBufferBytes = 4 << 20;     // limit on a tile's incomplete logits
constexpr float kNone = -87.0f;               // below this, exp (1e-38) is rounded to 0

// A draw's log-probabilities are (z - max) - log_z.
struct Normaliser {
  float max, log_z;
};

// A row's mixture statistics, summed over part of the vocabulary.
struct Mixture {
  double information;  // sum_v mean_k p_k log p_k - m log m, m = mean_k p_k
  double reverse;      // sum_v m (log m - mean_k log p_k)
  double sum_sq;       // sum_v m^2
  double spread;       // sum_v mean_k p_k^2 - m^2
};

// Adds the mixture of z[k][0, n) to `sums`; z becomes log-probabilities. Computed relative to top = max_k log p_k, the
// terms of `information`, `reverse` and `spread` are exactly 0 where the draws agree.
inline void mix(float* z, int64_t stride, int draws, int n, const Normaliser* norms /* [K] */, Mixture& sums) {
  const float share = 1.0f / draws;
  Vec information{}, reverse{}, sum_sq{}, spread{};
  for (int i = 0; i < n; i += kLanes) {
    Vec top = broadcast(-INFINITY);
    for (int k = 0; k < draws; ++k) {
      const Vec log_p = (load(z + k * stride + i) - norms[k].max) - norms[k].log_z;
      store(z + k * stride + i, log_p);
      top = maximum(log_p, top);
    }
    const IntVec absent = top < kNone;  // negligible in every draw
    top = absent ? Vec{} : top;
    Vec e_sum{}, x_sum{}, ex_sum{}, ee_sum{};
    for (int k = 0; k < draws; ++k) {
      const Vec x = load(z + k * stride + i) - top;
      const Vec near = x < kNone ? broadcast(kNone) : x;
      const Vec e = exp_scaled<0>(near);
      e_sum += e;
      x_sum += x;
      ex_sum += e * near;
      ee_sum += e * e;
    }
    const Vec mean = e_sum * share;  // of p_k / p_top
    const Vec log_mean = log(mean);
    Vec p = exp_scaled<0>(top);
    p = absent ? Vec{} : p;
    const Vec gap = absent ? Vec{} : mean * (log_mean - x_sum * share);
    information += p * (ex_sum * share - mean * log_mean);
    reverse += p * gap;
    sum_sq += (p * mean) * (p * mean);
    spread += p * p * (ee_sum * share - mean * mean);
  }
  sums.information += horizontal_sum(information);
  sums.reverse += horizontal_sum(reverse);
  sums.sum_sq += horizontal_sum(sum_sq);
  sums.spread += horizontal_sum(spread);
}

// Writes row `number`'s statistics that need no mixture, and its draws' normalisers, from the states of its draws.
inline void finish_draws(const RowState* states /* [K] */, int draws, int64_t number, int64_t rows,
                         Normaliser* norms /* [K] */, double* state /* [6, rows] */, int64_t* votes /* [K, rows] */) {
  double entropy = 0, top = -INFINITY, likelihood = 0;
  const auto logprob = [](const RowState& s) { return double(s.target) - double(s.max) - log1p(s.r); };
  for (int k = 0; k < draws; ++k) {
    const RowState& s = states[k];
    const double log_z = log1p(s.r);
    entropy += s.max == -INFINITY ? double(NAN) : log_z - s.s1 / (1 + s.r);
    norms[k] = {s.max, static_cast<float>(log_z)};
    votes[k * rows + number] = s.index;
    top = logprob(s) > top ? logprob(s) : top;
  }
  for (int k = 0; k < draws; ++k) likelihood += exp(logprob(states[k]) - top);  // relative to the largest
  state[number] = entropy / draws;
  state[3 * rows + number] = top == -INFINITY ? top : top + ::log(likelihood / draws);
}

// Writes row `number`'s statistics of the mixture, from those of the splits.
inline void finish_mixture(const Mixture* mixtures, int64_t splits, int64_t stride, int64_t number, int64_t rows,
                           double* state /* [6, rows] */) {
  Mixture total{};
  for (int64_t split = 0; split < splits; ++split) {
    const Mixture& m = mixtures[split * stride];
    total.information += m.information;
    total.reverse += m.reverse;
    total.sum_sq += m.sum_sq;
    total.spread += m.spread;
  }
  state[rows + number] = total.information;
  state[2 * rows + number] = total.reverse;
  state[4 * rows + number] = total.sum_sq;
  state[5 * rows + number] = total.spread;
}

// Lists the rows to score and returns their number; the others get NaN and votes of -1.
inline int64_t list_rows(const MixtureStatsArgs& args, int64_t* rows /* [N] */) {
  int64_t scored = 0;
  for (int64_t i = 0; i < args.rows; ++i) {
    if (args.head.targets && args.head.targets[i] == -100) {
      for (int s = 0; s < 6; ++s) args.state[s * args.rows + i] = NAN;
      for (int k = 0; k < args.draws; ++k) args.votes[k * args.rows + i] = -1;
    } else {
      rows[scored++] = i;
    }
  }
  return scored;
}

}  // namespace acqcore::ACQCORE_ISA
