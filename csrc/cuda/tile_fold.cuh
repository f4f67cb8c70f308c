// Folds a warp's 16 x 256 logits into row states, in the register layout of a warpgroup's matrix product.
//
// Four lanes share a row. They agree on its maximum, runner-up and index; each holds the sums over its own 64 columns
// of every tile. Instructions per logit: 1 for the maximum, 1 subtraction, 1 clamp, 1 fma, 1 exp2, 5 for the sums: 10.
// The maximum is located and taken out of the sums only when it rises. The maxima of eight groups of columns, needed
// for the row's maximum anyway, locate it.
#pragma once
#include "fold.cuh"
#include "launch.h"

namespace acqcore::cuda {

constexpr int kTileColumns = 256;
constexpr int kLaneLogits = 128;  // per lane and tile: 64 columns of two rows, eight apart
constexpr int kSharing = 4;       // lanes per row
constexpr int kColumnGroups = 8;  // of 32 columns, 8 of each lane
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLowest = -140.0f;  // at and below, exp gives 0

// A lane's state of a row. `top`, `second` and `index` are the same in the four lanes that share it.
struct RowLane {
  float top, second;  // largest logit, largest of all others
  int index;          // the first column that holds `top`
  Sums<float> sums;   // scaled as in fold.cuh; over this lane's columns except `index`
};

// The state of a row over a split of the vocabulary, as stored in memory.
struct alignas(32) RowPartial {
  float top, second;
  Sums<float> sums;
  int index;
};

ACQCORE_DEVICE RowLane empty_row() { return {-INFINITY, -INFINITY, -1, {0, 0, 0, 0}}; }

// The register of member `m` of column group `g` of row `half`, and the tile's column that a register holds.
ACQCORE_DEVICE constexpr int register_of(int half, int g, int m) { return 4 * (4 * g + m / 2) + 2 * half + m % 2; }
ACQCORE_DEVICE constexpr int column_of_register(int lane, int i) {
  return 8 * (i / 4) + 2 * (lane % kSharing) + i % 2;
}

// Removes the first logit equal to `top` from a lane's part of row `half`; returns its column in the tile, or -1.
template <int half>
ACQCORE_DEVICE int take_out(float (&z)[kLaneLogits], float (&groups)[kColumnGroups], float top, int lane) {
  int column = -1;
  ACQCORE_UNROLL
  for (int g = 0; g < kColumnGroups; ++g) {
    if (column >= 0 || groups[g] != top) continue;
    int at = 0;
    ACQCORE_UNROLL
    for (int m = 7; m >= 0; --m) at = z[register_of(half, g, m)] == top ? m : at;
    float rest = -INFINITY;
    ACQCORE_UNROLL
    for (int m = 0; m < 8; ++m) {
      float& logit = z[register_of(half, g, m)];
      logit = m == at ? -INFINITY : logit;
      rest = fmaxf(rest, logit);
    }
    groups[g] = rest;
    column = 8 * (4 * g + at / 2) + 2 * (lane % kSharing) + at % 2;
  }
  return column;
}

ACQCORE_DEVICE float largest_of(const float (&groups)[kColumnGroups]) {
  const float a = fmaxf(fmaxf(groups[0], groups[1]), fmaxf(groups[2], groups[3]));
  return fmaxf(a, fmaxf(fmaxf(groups[4], groups[5]), fmaxf(groups[6], groups[7])));
}

// How a tile that raised a row's maximum affects the row's exponentials.
struct Raised {
  static constexpr int kNone = 1 << 30;
  int taken;     // the column of the tile where this lane found the new maximum
  float factor;  // rescales the terms of earlier tiles
};

// Rebases rows whose maximum the tile raises: the new maximum leaves the tile, the old one joins the sums.
template <int half>
ACQCORE_DEVICE void raise_rows(float (&z)[kHeld][kLaneLogits], float (&groups)[kHeld][kColumnGroups],
                               const float (&tile_top)[kHeld], int begin, RowLane (&rows)[kHeld][2],
                               Raised (&raised)[kHeld][2]) {
  constexpr int none = Raised::kNone;
  int own[kHeld], first[kHeld];
  float rest[kHeld];
  ACQCORE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    own[i] = none;
    if (tile_top[i] > rows[i][half].top && largest_of(groups[i]) == tile_top[i]) {
      own[i] = take_out<half>(z[i], groups[i], tile_top[i], lane_of(i));
    }
    raised[i][half].taken = own[i];
    first[i] = own[i];
    rest[i] = largest_of(groups[i]);
  }
  butterfly<kSharing>(first, [](int a, int b) { return a < b ? a : b; });
  ACQCORE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    if (own[i] != first[i] && own[i] != none) rest[i] = tile_top[i];
  }
  butterfly<kSharing>(rest, [](float a, float b) { return fmaxf(a, b); });
  ACQCORE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    RowLane& row = rows[i][half];
    if (!(tile_top[i] > row.top)) {
      row.second = fmaxf(row.second, tile_top[i]);
      continue;
    }
    const float d = fmaxf(row.top - tile_top[i], kLowest);
    const float y = d * kLog2e;
    const float c = exp2_flushed(y);
    rebase(row.sums, c, d);
    if (row.top != -INFINITY) raised[i][half].factor = c;
    if (lane_of(i) % kSharing == 0) add_term(row.sums, exp2_flushed(y + kTermLog2), d);
    // An equal maximum in a higher column is an ordinary term.
    if (own[i] != first[i] && own[i] != none) add_term(row.sums, 0x1p40f, 0.0f);
    row.second = fmaxf(row.top, rest[i]);
    row.top = tile_top[i];
    row.index = begin + first[i];
  }
}

// Folds the tile whose first column is `begin` into the rows' states. -inf marks an absent token. With `keeps`, logits
// are overwritten by 2^40 exp(z - top), and by 0 where a lane found a new maximum.
template <bool keeps>
ACQCORE_DEVICE void fold_tile(float (&z)[kHeld][kLaneLogits], int begin, RowLane (&rows)[kHeld][2],
                              Raised (&raised)[kHeld][2]) {
  float groups[2][kHeld][kColumnGroups], tile_top[2][kHeld];
  ACQCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    ACQCORE_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      ACQCORE_UNROLL
      for (int g = 0; g < kColumnGroups; ++g) {
        float top = z[i][register_of(half, g, 0)];
        ACQCORE_UNROLL
        for (int m = 1; m < 8; ++m) top = fmaxf(top, z[i][register_of(half, g, m)]);
        groups[half][i][g] = top;
      }
      tile_top[half][i] = largest_of(groups[half][i]);
    }
    butterfly<kSharing>(tile_top[half], [](float a, float b) { return fmaxf(a, b); });
  }
  for (int i = 0; i < kHeld; ++i) raised[i][0] = raised[i][1] = {Raised::kNone, 1.0f};
  bool rises[kHeld];
  for (int i = 0; i < kHeld; ++i) rises[i] = tile_top[0][i] > rows[i][0].top;
  if (ballot(rises)) {
    raise_rows<0>(z, groups[0], tile_top[0], begin, rows, raised);
  } else {
    for (int i = 0; i < kHeld; ++i) rows[i][0].second = fmaxf(rows[i][0].second, tile_top[0][i]);
  }
  for (int i = 0; i < kHeld; ++i) rises[i] = tile_top[1][i] > rows[i][1].top;
  if (ballot(rises)) {
    raise_rows<1>(z, groups[1], tile_top[1], begin, rows, raised);
  } else {
    for (int i = 0; i < kHeld; ++i) rows[i][1].second = fmaxf(rows[i][1].second, tile_top[1][i]);
  }
  ACQCORE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    // Avoids -inf - -inf in a row without a finite logit so far.
    const float reference[2] = {rows[i][0].top == -INFINITY ? 0.0f : rows[i][0].top,
                                rows[i][1].top == -INFINITY ? 0.0f : rows[i][1].top};
    Sums<float> tile[2] = {};  // summed per tile first: short chains of 64 terms instead of thousands
    ACQCORE_UNROLL
    for (int j = 0; j < kLaneLogits; ++j) {
      const int half = j / 2 % 2;
      const float x = maximum_or_nan(z[i][j] - reference[half], kLowest);
      const float e = exp2_flushed(fmaf(x, kLog2e, kTermLog2));
      add_term(tile[half], e, x);
      if constexpr (keeps) z[i][j] = e;
    }
    add(rows[i][0].sums, tile[0]);
    add(rows[i][1].sums, tile[1]);
  }
}

// Adds the sums of the four lanes, so that every lane holds its rows' complete states.
ACQCORE_DEVICE void combine_lanes(RowLane (&rows)[kHeld][2]) {
  const auto plus = [](float a, float b) { return a + b; };
  ACQCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    float r[kHeld], s1[kHeld], s2[kHeld], s11[kHeld];
    for (int i = 0; i < kHeld; ++i) {
      const Sums<float>& s = rows[i][half].sums;
      r[i] = s.r, s1[i] = s.s1, s2[i] = s.s2, s11[i] = s.s11;
    }
    butterfly<kSharing>(r, plus);
    butterfly<kSharing>(s1, plus);
    butterfly<kSharing>(s2, plus);
    butterfly<kSharing>(s11, plus);
    for (int i = 0; i < kHeld; ++i) rows[i][half].sums = {r[i], s1[i], s2[i], s11[i]};
  }
}

// Exponentials of 128 rows of a tile in bfloat16, for the warpgroup's product: four matrices of 64 columns, 128 bytes
// per row, 16-byte words swizzled like the copy engine's.
constexpr int kGramRows = 128;
constexpr int kGramChunk = kGramRows * 128;  // bytes per 64 columns
constexpr int kGramTileBytes = kTileColumns / 64 * kGramChunk;

ACQCORE_DEVICE constexpr int place_of(int row, int column) {
  return column / 64 * kGramChunk + row * 128 + (column % 64 / 8 ^ row % 8) * 16 + column % 8 * 2;
}

ACQCORE_DEVICE uint32_t bfloat16_pair(float low, float high) {
#if defined(__CUDACC__)
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  const auto rounded = [](float f) { return (to_bits(f) + 0x7fff + (to_bits(f) >> 16 & 1)) >> 16; };
  return rounded(low) | rounded(high) << 16;
#endif
}

constexpr uint16_t kTopTerm = (127 + 40) << 7;  // 2^40 in bfloat16

// Stores the terms that fold_tile<true> left for a warp's 16 rows, from row `first_row` of `tile` on.
ACQCORE_DEVICE void store_terms(const float (&e)[kHeld][kLaneLogits], const Raised (&raised)[kHeld][2],
                                int first_row, char* tile) {
  ACQCORE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    const int row = first_row + lane_of(i) / kSharing;
    ACQCORE_UNROLL
    for (int j = 0; j < kLaneLogits; j += 2) {
      const int column = column_of_register(lane_of(i), j);
      *reinterpret_cast<uint32_t*>(tile + place_of(row + 8 * (j / 2 % 2), column)) =
          bfloat16_pair(e[i][j], e[i][j + 1]);
    }
    ACQCORE_UNROLL
    for (int half = 0; half < 2; ++half) {  // in the lane's own columns, which no other lane writes
      const int column = raised[i][half].taken;
      if (column != Raised::kNone) *reinterpret_cast<uint16_t*>(tile + place_of(row + 8 * half, column)) = kTopTerm;
    }
  }
  sync_warp();
}

// tanh within 2 ulp: an odd polynomial near 0 (Cephes tanhf), else (1 - t) / (1 + t) with t = exp(-2 |y|).
ACQCORE_DEVICE float tanh_of(float y) {
  const float a = fabsf(y), s = y * y;
  const float t = exp2_flushed(a * (-2 * kLog2e));
  const float far = quotient(1 - t, 1 + t);
  float p = fmaf(s, -5.70498872745e-3f, 2.06390887954e-2f);
  p = fmaf(p, s, -5.37397155531e-2f);
  p = fmaf(p, s, 1.33314422036e-1f);
  p = fmaf(p, s, -3.33332819422e-1f);
  return a < 0.625f ? fmaf(p * s, y, y) : copysignf(far, y);
}

// product -> logit: cap(scale (product + bias)).
enum class Transform { kNone, kAffine, kCapped };
struct Logits {
  const float* bias;  // [V] or null
  float scale;        // divided by the cap, or by the temperature without one
  float cap;          // multiplies tanh, divided by the temperature
  int vocab;
};

inline Logits logits_of(const RowStatsArgs& args, int vocab) {
  const bool capped = args.softcap != 0;
  const double inner = capped ? args.softcap : args.temperature;
  return {args.bias, float(args.scale / inner), float((capped ? args.softcap : 1.0) / args.temperature), vocab};
}

// Whether uncapped logits differ from products.
inline bool changes(const Logits& logits) { return logits.bias || logits.scale != 1; }

// `product` includes the bias.
template <Transform transform>
ACQCORE_DEVICE float logit_of(float product, const Logits& logits) {
  if constexpr (transform == Transform::kNone) return product;
  const float z = product * logits.scale;
  return transform == Transform::kCapped ? tanh_of(z) * logits.cap : z;
}

template <bool whole>
ACQCORE_DEVICE void add_bias(float (&z)[kHeld][kLaneLogits], int begin, const Logits& logits) {
  ACQCORE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    ACQCORE_UNROLL
    for (int j = 0; j < kLaneLogits; j += j % 2 ? 3 : 1) {  // the first row's; the second has the same columns
      const int column = begin + column_of_register(lane_of(i), j);
      const float bias = whole || column < logits.vocab ? logits.bias[column] : 0.0f;
      z[i][j] += bias;
      z[i][j + 2] += bias;
    }
  }
}

// Turns the products of the tile at `begin` into logits; -inf beyond the vocabulary.
template <Transform transform>
ACQCORE_DEVICE void finish_logits(float (&z)[kHeld][kLaneLogits], int begin, const Logits& logits) {
  const bool whole = begin + kTileColumns <= logits.vocab;
  if constexpr (transform != Transform::kNone) {
    if (logits.bias) whole ? add_bias<true>(z, begin, logits) : add_bias<false>(z, begin, logits);
    ACQCORE_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      ACQCORE_UNROLL
      for (int j = 0; j < kLaneLogits; ++j) z[i][j] = logit_of<transform>(z[i][j], logits);
    }
  }
  if (whole) return;
  ACQCORE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    ACQCORE_UNROLL
    for (int j = 0; j < kLaneLogits; ++j) {
      if (begin + column_of_register(lane_of(i), j) >= logits.vocab) z[i][j] = -INFINITY;
    }
  }
}

ACQCORE_DEVICE RowPartial partial_of(const RowLane& row) { return {row.top, row.second, row.sums, row.index}; }

// The first tile of a split. Splits are runs of tiles whose lengths differ by at most one.
ACQCORE_DEVICE int split_begin(int split, int splits, int tiles) {
  return static_cast<int>(int64_t(split) * tiles / splits);
}

// Converts to float64, unscaled, without a target.
ACQCORE_DEVICE RowState state_of(const RowPartial& p) {
  const Sums<double> sums = {p.sums.r * kUnscale, p.sums.s1 * kUnscale, p.sums.s2 * (kUnscale * kUnscale),
                             p.sums.s11 * kUnscale};
  return {p.top, p.second, -INFINITY, sums, p.index};
}

constexpr int kMergeLanes = 8;  // lanes merging a row's splits: a run each, then pairwise, lower splits on the left

// A row's state over the lane's run of splits; `partials` of consecutive splits are `stride` apart.
ACQCORE_DEVICE RowState merged_stretch(const RowPartial* partials, int64_t stride, int lane, int splits) {
  RowState s = {-INFINITY, -INFINITY, -INFINITY, {0, 0, 0, 0}, -1};
  const int last = split_begin(lane + 1, kMergeLanes, splits);
  for (int split = split_begin(lane, kMergeLanes, splits); split < last; ++split) {
    merge(s, state_of(partials[split * stride]));
  }
  return s;
}

}  // namespace acqcore::cuda
