// Splits a row into groups, loads and folds them, and combines the results.
//
// A row is split into groups of kGroup logits, counted from its first column; one warp folds one group. The number of
// rows and multiprocessors determines which warp of which block folds a group, but not the arithmetic: a logit's lane
// and place within a group follow from its column, and the groups of a row are combined in a fixed order. A row's state
// is therefore bitwise independent of the batch, the strides, the alignment and the number of multiprocessors.
#pragma once
#include "fold.cuh"
#include "launch.h"

namespace acqcore::cuda {

constexpr int kGroup = 4096;      // logits: 9 % of a group's instructions reduce it; 8 rows of 150k make 300 warps
constexpr int kVectors = 4;       // 16-byte loads per lane in flight for the next chunk while one is being folded
constexpr int kChunkWords = 4 * kVectors;
constexpr int kMaxWarps = 4;      // per block: six blocks share a multiprocessor
constexpr int kBlocksPerMultiprocessor = 48;  // target minimum: eight waves, so that a partial last wave costs little
constexpr int kSharedGroups = 1024;           // most groups of a row that one block combines, in 32 KiB
constexpr int64_t kScratchBytes = 16 << 20;

template <DType dtype>
constexpr int kVectorLogits = 4 * Words<dtype>::kPer;
template <DType dtype>
constexpr int kChunk = kWarp * kVectors * kVectorLogits<dtype>;  // logits a warp folds at a time

struct Plan {
  int groups;  // per row
  int warps;   // per block
  int parts;   // blocks per row; if 1, the block combines the row, otherwise combine_rows() does
  int64_t rows_per_pass;
};

inline Plan plan(int64_t rows, int64_t columns, int multiprocessors) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto lesser = [](int64_t a, int64_t b) { return a < b ? a : b; };
  Plan p;
  p.groups = static_cast<int>(ceil_div(columns, kGroup));
  p.warps = static_cast<int>(lesser(p.groups, kMaxWarps));
  if (rows * ceil_div(p.groups, p.warps) < 2 * multiprocessors) p.warps = 1;  // few rows: spread their warps
  const int64_t wanted = ceil_div(int64_t(multiprocessors) * kBlocksPerMultiprocessor, rows > 0 ? rows : 1);
  p.parts = static_cast<int>(lesser(wanted, ceil_div(p.groups, p.warps)));
  if (p.parts == 1 && p.groups > kSharedGroups) p.parts = 2;
  p.rows_per_pass = (int64_t(1) << 30) / p.parts;
  if (p.parts > 1) {
    const int64_t fit = kScratchBytes / (int64_t(p.groups) * int64_t(sizeof(GroupState)));
    p.rows_per_pass = lesser(p.rows_per_pass, fit > 0 ? fit : 1);
  }
  p.rows_per_pass = lesser(p.rows_per_pass, rows);
  return p;
}

inline int64_t scratch_of(const Plan& p) {
  return p.parts == 1 ? 0 : p.rows_per_pass * p.groups * int64_t(sizeof(GroupState));
}

inline Exponential exponential_of(double temperature) {
  const double rate = 1.4426950408889634 / temperature;
  return {static_cast<float>(rate), static_cast<float>(-170.0 / rate)};
}

// Whether a row's logits are contiguous. Such a row is read 16 bytes at a time, whatever its alignment.
inline bool loads_vectors(const Matrix& m) { return m.column_stride == 1; }

// One row in memory.
template <DType dtype>
struct Row {
  const typename Words<dtype>::Element* data;
  int columns;
  int64_t stride;
  bool vectors;
};

template <DType dtype>
ACQCORE_DEVICE Row<dtype> row_of(const Matrix& m, int64_t row, bool vectors) {
  using Element = typename Words<dtype>::Element;
  const Element* data = static_cast<const Element*>(m.data) + row * m.row_stride;
  return {data, static_cast<int>(m.columns), m.column_stride, vectors};
}

#if defined(__CUDACC__)
template <int k>
ACQCORE_DEVICE void shift(const uint4& low, const uint4& high, uint32_t bits, uint32_t (&words)[4]) {
  const uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  ACQCORE_UNROLL
  for (int i = 0; i < 4; ++i) words[i] = __funnelshift_r(w[k + i], w[k + i + 1], bits);
}

// Loads the 16 bytes that start `skipped` bytes after the 16-byte aligned `aligned`; both vectors must be allocated.
ACQCORE_DEVICE void load_shifted(const uint4* aligned, uint32_t skipped, uint32_t (&words)[4]) {
  const uint4 low = __ldg(aligned), high = __ldg(aligned + 1);
  const uint32_t bits = 8 * (skipped % 4);
  switch (skipped / 4) {  // uniform across the row
    case 0: return shift<0>(low, high, bits, words);
    case 1: return shift<1>(low, high, bits, words);
    case 2: return shift<2>(low, high, bits, words);
    default: return shift<3>(low, high, bits, words);
  }
}
#endif

// Loads a lane's words of the full chunk at column `begin`, 16 bytes at a time: vector j of lane i is vector 32 j + i.
// All vectors of a row share the alignment of its first.
template <DType dtype>
ACQCORE_DEVICE void load_vectors(const Row<dtype>& row, int begin, int lane, uint32_t (&words)[kChunkWords]) {
  const auto* source = row.data + begin + lane * kVectorLogits<dtype>;
#if defined(__CUDACC__)
  const uint32_t skipped = reinterpret_cast<uintptr_t>(row.data) % 16;  // chunks consist of whole vectors
  const auto* aligned = reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(source) - skipped);
#endif
  ACQCORE_UNROLL
  for (int j = 0; j < kVectors; ++j) {
#if defined(__CUDACC__)
    uint32_t loaded[4];
    if (skipped == 0) {
      const uint4 v = __ldcs(aligned + j * kWarp);
      loaded[0] = v.x, loaded[1] = v.y, loaded[2] = v.z, loaded[3] = v.w;
    } else {
      load_shifted(aligned + j * kWarp, skipped, loaded);
    }
    ACQCORE_UNROLL
    for (int i = 0; i < 4; ++i) words[4 * j + i] = loaded[i];
#else
    memcpy(words + 4 * j, source + j * kWarp * kVectorLogits<dtype>, 16);
#endif
  }
}

// The column, within the chunk, of logit `half` of a lane's word `i`.
template <DType dtype>
ACQCORE_DEVICE int column_of(int lane, int i, int half) {
  return (i / 4 * kWarp + lane) * kVectorLogits<dtype> + i % 4 * Words<dtype>::kPer + half;
}

// Loads the same words one logit at a time, for any stride and for the end of a row (-inf beyond it).
template <DType dtype>
ACQCORE_DEVICE void load_logits(const Row<dtype>& row, int begin, int lane, uint32_t (&words)[kChunkWords]) {
  ACQCORE_UNROLL
  for (int i = 0; i < kChunkWords; ++i) {
    uint32_t word = Words<dtype>::kAbsent;
    ACQCORE_UNROLL
    for (int half = 0; half < Words<dtype>::kPer; ++half) {
      const int column = begin + column_of<dtype>(lane, i, half);
      if (column >= row.columns) continue;
      const uint32_t logit = row.data[column * row.stride];
      if constexpr (Words<dtype>::kPer == 1) {
        word = logit;
      } else {
        word = half == 0 ? (word & 0xffff0000u) | logit : (word & 0xffffu) | logit << 16;
      }
    }
    words[i] = word;
  }
}

template <DType dtype>
ACQCORE_DEVICE void load_chunk(const Row<dtype>& row, int begin, int lane, uint32_t (&words)[kChunkWords]) {
  if (row.vectors && begin + kChunk<dtype> <= row.columns) {
    load_vectors(row, begin, lane, words);
  } else {
    load_logits(row, begin, lane, words);
  }
}

// Folds group `group` of a row with one warp.
template <DType dtype>
ACQCORE_DEVICE GroupState fold_group(const Row<dtype>& row, int group, const Exponential& exponential) {
  constexpr int chunks = kGroup / kChunk<dtype>;
  const int begin = group * kGroup;
  Lane<dtype> lanes[kHeld];
  uint32_t words[kHeld][kChunkWords];
  for (int i = 0; i < kHeld; ++i) lanes[i] = empty_lane<dtype>();
  if (row.vectors && row.columns - begin >= kGroup) {
    uint32_t next[kHeld][kChunkWords];
    for (int i = 0; i < kHeld; ++i) load_vectors(row, begin, lane_of(i), next[i]);
    ACQCORE_UNROLL
    for (int chunk = 0; chunk < chunks; ++chunk) {
      for (int i = 0; i < kHeld; ++i) {
        memcpy(words[i], next[i], sizeof words[i]);
        if (chunk + 1 < chunks) load_vectors(row, begin + (chunk + 1) * kChunk<dtype>, lane_of(i), next[i]);
        fold_words<dtype>(words[i], chunk, exponential, lanes[i]);
      }
    }
  } else {
    for (int chunk = 0; chunk < chunks && begin + chunk * kChunk<dtype> < row.columns; ++chunk) {
      for (int i = 0; i < kHeld; ++i) {
        load_chunk(row, begin + chunk * kChunk<dtype>, lane_of(i), words[i]);
        fold_words<dtype>(words[i], chunk, exponential, lanes[i]);
      }
    }
  }
  return reduce(lanes, exponential);
}

// The lowest column of `row` that holds a group's maximum. The lanes that found it reload their part of its chunk.
template <DType dtype>
ACQCORE_DEVICE int64_t first_column(const Row<dtype>& row, const GroupState& state, int group) {
  const int begin = group * kGroup + state.chunk * kChunk<dtype>;
  int first[kHeld];
  for (int i = 0; i < kHeld; ++i) {
    const int lane = lane_of(i);
    first[i] = row.columns;
    if (!(state.lanes >> lane & 1)) continue;
    uint32_t words[kChunkWords];
    load_chunk(row, begin, lane, words);
    ACQCORE_UNROLL
    for (int j = kChunkWords - 1; j >= 0; --j) {
      ACQCORE_UNROLL
      for (int half = Words<dtype>::kPer - 1; half >= 0; --half) {
        if (Words<dtype>::get(words[j], half) == state.max) first[i] = begin + column_of<dtype>(lane, j, half);
      }
    }
  }
  butterfly(first, [](int a, int b) { return b < a ? b : a; });
  return first[0];
}

// Combines the states of a row's groups with one warp. `target` may lie outside the row.
template <DType dtype>
ACQCORE_DEVICE RowState combine(const Row<dtype>& row, const GroupState* groups, int count, double temperature,
                                int64_t target) {
  const auto greater = [](double a, double b) { return b > a ? b : a; };
  const auto plus = [](double a, double b) { return a + b; };
  float max[kHeld];
  int winner[kHeld];
  for (int i = 0; i < kHeld; ++i) {
    max[i] = -INFINITY;
    for (int g = lane_of(i); g < count; g += kWarp) max[i] = fmaxf(max[i], groups[g].max);
  }
  butterfly(max, [](float a, float b) { return b > a ? b : a; });
  for (int i = 0; i < kHeld; ++i) {
    winner[i] = count;
    for (int g = lane_of(i); g < count && winner[i] == count; g += kWarp) {
      if (groups[g].max == max[i]) winner[i] = g;
    }
  }
  butterfly(winner, [](int a, int b) { return b < a ? b : a; });
  double second[kHeld], r[kHeld], s1[kHeld], s2[kHeld], s11[kHeld];
  for (int i = 0; i < kHeld; ++i) {
    Sums<double> sums = {0, 0, 0, 0};
    second[i] = -INFINITY;
    for (int g = lane_of(i); g < count; g += kWarp) {
      const GroupState group = groups[g];
      Sums<double> s = {group.sums.r * kUnscale, group.sums.s1 * kUnscale, group.sums.s2 * (kUnscale * kUnscale),
                        group.sums.s11 * kUnscale};
      second[i] = greater(second[i], group.second);
      if (group.max > -INFINITY && g != winner[i]) {
        const double d = double(group.max) - double(max[i]);
        const double c = exp(d / temperature);
        rebase(s, c, d);
        add_term(s, c, d);  // the term of the group's own maximum
        second[i] = greater(second[i], group.max);
      }
      add(sums, s);
    }
    r[i] = sums.r;
    s1[i] = sums.s1;
    s2[i] = sums.s2;
    s11[i] = sums.s11;
  }
  butterfly(second, greater);
  butterfly(r, plus);
  butterfly(s1, plus);
  butterfly(s2, plus);
  butterfly(s11, plus);
  RowState state = {max[0] / temperature, second[0] / temperature, -INFINITY,
                    {r[0], s1[0] / temperature, s2[0], s11[0] / (temperature * temperature)}, -1};
  if (max[0] > -INFINITY) state.index = first_column(row, groups[winner[0]], winner[0]);
  if (target >= 0 && target < row.columns) {
    uint32_t word = row.data[target * row.stride];
    state.target = Words<dtype>::get(word, 0) / temperature;
  }
  return state;
}

ACQCORE_DEVICE bool ignored(const LogitStatsArgs& args, int64_t row) {
  return args.targets && args.targets[row] == -100;
}

// Writes a row's state, or NaN if `s` is null (an ignored row).
ACQCORE_DEVICE void write_state(const LogitStatsArgs& args, int64_t row, const RowState* s) {
  const double values[7] = {s ? s->max : NAN,     s ? s->second : NAN,   s ? s->sums.r : NAN,  s ? s->sums.s1 : NAN,
                            s ? s->sums.s2 : NAN, s ? s->sums.s11 : NAN, s ? s->target : NAN};
  for (int i = 0; i < 7; ++i) args.state[i * args.logits.rows + row] = values[i];
  args.index[row] = s ? s->index : -1;
}

// Combines a row's groups and writes its state; with args.accumulate, merges it with the state of earlier columns.
template <DType dtype>
ACQCORE_DEVICE void finish_row(const LogitStatsArgs& args, int64_t row, const Row<dtype>& logits,
                               const GroupState* groups, int count) {
  const int64_t target = args.targets ? args.targets[row] - args.vocab_start : -1;
  RowState state = combine(logits, groups, count, args.temperature, target);
  if (lane_of(0) != 0) return;
  if (state.index >= 0) state.index += args.vocab_start;
  if (args.accumulate) {
    const double* s = args.state + row;
    const int64_t n = args.logits.rows;
    RowState earlier = {s[0], s[n], s[6 * n], {s[2 * n], s[3 * n], s[4 * n], s[5 * n]}, args.index[row]};
    merge(earlier, state);
    state = earlier;
  }
  write_state(args, row, &state);
}

// Folds one warp's share of a row's groups, in block `part` of the blocks that share the row.
template <DType dtype>
ACQCORE_DEVICE void fold_share(const Row<dtype>& row, const Plan& plan, int part, int warp,
                               const Exponential& exponential, GroupState* groups /* [plan.groups], written */) {
  for (int g = part * plan.warps + warp; g < plan.groups; g += plan.parts * plan.warps) {
    const GroupState state = fold_group(row, g, exponential);
    if (lane_of(0) == 0) groups[g] = state;
  }
}

}  // namespace acqcore::cuda
