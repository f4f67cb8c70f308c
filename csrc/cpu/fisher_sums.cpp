// Row statistics, and the sums from which random cotangents of the logits, pulled back through the head, follow
// (fisher.py): over the vocabulary, sums of e cap' W and, for each probe's signs r, of sqrt(e) r cap' W with
// e = exp(z - max). The logits are never materialized.
//
// For each tile of the vocabulary a block folds the logits, forms the factors e cap' and sqrt(e) r cap', and adds their
// products with the tile's weights to separate sums (values.h). The sums exclude the largest logit so far, the top;
// when it rises, they are rescaled and the former top joins them. Signs are bits of Philox words, recomputed per tile:
// 128 columns per counter. With bfloat16 inputs, products of bfloat16 use sqrt(e) rounded to it, in sums with and
// without W alike, so that a cotangent still adds up to 0: its entries change by 0.1 %, the expectation of their
// squares by 1e-6, and half of the products are saved.
#include "../philox.h"
#include "fold.h"
#include "isa.h"
#include "tasks.h"
#include "values.h"

namespace acqcore::ACQCORE_ISA {
namespace {

// Maximum. With 4 probes a thread uses 5 MB; half as many rows are 15 % slower.
constexpr int64_t kBlockRows = (kHasTiles ? 64 : 32) * kVectorRows;
constexpr float kLowestRoot = -87.0f;            // below this, exp (1e-38) is rounded to 0
constexpr int kWords = kTile / 32 + 4;           // words of a tile's signs, up to the end of the last counter
static_assert(kTile % 32 == 0, "a tile begins with a word of signs");

// The largest logit of a row so far: the reference of its sums, which exclude it.
struct Top {
  float logit;
  int64_t column;  // in this weight; -1 before the first finite logit
};

// Per-thread scratch.
struct Workspace {
  float* hidden;   // [block_rows / kPanelRows, units, kPanelRows]
  float* weights;  // [kTile / kPanelColumns, depth, kPanelColumns]
  float* values;   // [columns / kPanelColumns, kTile, kPanelColumns]
  float* split;    // [2, kTile / 2, kPanelRows]
  float* factors;  // [probes + 1, block_rows, kTile]
  float* sums;     // [probes + 1, block_rows, columns]
  Top* tops;          // [block_rows]
  LaneState* lanes;   // [block_rows]
  RowState* states;   // [block_rows]
};

// Whether square roots are rounded to bfloat16: only if the inputs are.
inline bool rounds(const HeadArgs& head) {
  return kHasBf16Product && is_bfloat16(head.hidden) && is_bfloat16(head.weight);
}

// Sign words of columns [tile, tile + kTile): bit i of word w belongs to column tile + 32 w + i.
void sign_words(const FisherSumsArgs& args, int64_t row, int probe, int64_t tile, uint32_t* words /* [kWords] */) {
  const int64_t first = tile / 32, last = first + kTile / 32;
  for (int64_t group = first / 4; group * 4 < last; ++group) {
    uint32_t found[4];
    mask_words(args.seed, static_cast<uint32_t>(group), static_cast<uint32_t>(args.positions[row]),
               static_cast<uint32_t>(args.samples[row]), static_cast<uint32_t>(probe), kSignSite, found);
    for (int i = 0; i < 4; ++i) {
      const int64_t word = group * 4 + i - first;
      if (word >= 0 && word < kWords) words[word] = found[i];
    }
  }
}

// Sets the sign bit of x in every lane i whose bit `shift` + i of `word` is 0.
inline Vec with_signs(Vec x, uint32_t word, int shift) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const IntVec bits = (IntVec{} + static_cast<int32_t>(word)) >> (lane + shift);
  const IntVec negative = ((bits & 1) ^ 1) << 31;
  return (Vec)((IntVec)x ^ negative);
}

// The sign, 1 or -1, of one column.
float sign_of(const FisherSumsArgs& args, int64_t row, int probe, int64_t column) {
  uint32_t words[4];
  mask_words(args.seed, static_cast<uint32_t>(column / 128), static_cast<uint32_t>(args.positions[row]),
             static_cast<uint32_t>(args.samples[row]), static_cast<uint32_t>(probe), kSignSite, words);
  return words[column / 32 % 4] >> (column % 32) & 1 ? 1.0f : -1.0f;
}

// Rebases a row's sums from `top` to a larger logit; `top` joins them as an ordinary column.
void raise(const FisherSumsArgs& args, const Transform& transform, int64_t row, const Top& top, float largest,
           int64_t probe_stride, float* sums /* [probes + 1, columns], probe_stride apart */) {
  if (top.column < 0) return;  // nothing was added yet
  const Matrix& weight = args.head.weight;
  const int64_t n = args.head.hidden.rows;
  const float root = expf((top.logit - largest) * 0.5f), e = root * root;
  const float tanh = transform.capped ? top.logit / transform.after : 0, slope = 1.0f - tanh * tanh;
  float values[kPanelColumns];
  double squares = 0;
  for (int k = 0; k <= args.probes; ++k) {
    const float shrink = k == 0 ? e : root;
    const float sign = k == 0 ? 1.0f : sign_of(args, row, k - 1, top.column);
    float* sum = sums + k * probe_stride;
    for (int64_t j = 0; j < weight.columns; j += kPanelColumns) {
      const int64_t present = lesser(kPanelColumns, weight.columns - j);
      load_floats(weight, top.column, j, present, values);
      for (int64_t i = 0; i < present; ++i) {
        sum[j + i] = sum[j + i] * shrink + shrink * sign * slope * values[i];
        if (k == 0) squares += double(values[i]) * values[i];
      }
    }
    if (k > 0) {
      double& signed_sum = args.signed_sums[(k - 1) * n + row];
      signed_sum = (signed_sum + sign) * root;
    }
  }
  args.squares[row] = (args.squares[row] + squares * slope * slope) * e;
}

// Turns a row's logits z[0, width) into the factors of e, in place, and of each probe; pads the last vector with zeros.
void to_factors(const FisherSumsArgs& args, const Transform& transform, int64_t row, int64_t tile, int width,
                const Top& top, int64_t probe_stride, const float* norms, float* z) {
  const int64_t n = args.head.hidden.rows, skip = top.column - tile;
  const float inverse = transform.capped ? 1 / transform.after : 0;  // z * inverse = tanh
  float roots[kTile], slopes[kTile];  // 0 past the width, where the logits are -inf
  Vec squares = {};
  for (int i = 0; i < width; i += kLanes) {
    const Vec logits = load(z + i);
    Vec x = (logits - top.logit) * 0.5f;
    const Vec root = exp_above<0>(x, kLowestRoot);
    const Vec t = logits * inverse;
    store(roots + i, root);
    store(slopes + i, root == 0 ? Vec{} : 1.0f - t * t);
  }
  if (skip >= 0 && skip < width) roots[skip] = 0;
  const bool rounded = rounds(args.head);
  for (int i = 0; i < width; i += kLanes) {
    const Vec root = load(roots + i), slope = load(slopes + i);
    const Vec factor = root * root * slope;
    store(z + i, factor);
    squares += factor * slope * load(norms + i);
    if (rounded) store(roots + i, high_part(root));
  }
  args.squares[row] += horizontal_sum(squares);
  for (int k = 0; k < args.probes; ++k) {
    uint32_t words[kWords];
    sign_words(args, row, k, tile, words);
    float* out = z + (k + 1) * probe_stride;
    Vec sum = {};
    for (int i = 0; i < width; i += kLanes) {
      const Vec root = with_signs(load(roots + i), words[i / 32], i % 32);
      sum += root;
      store(out + i, root * load(slopes + i));
    }
    args.signed_sums[k * n + row] += horizontal_sum(sum);
  }
}

// Squared norms of the weights, computed once: with bfloat16 tiles they would cost each block as much as its product.
void row_norms(const HeadArgs& head, float* norms /* [V] */) {
  const Matrix& weight = head.weight;
#pragma omp parallel for num_threads(head.threads)
  for (int64_t v = 0; v < weight.rows; ++v) {
    float row[kPanelColumns];
    Vec squares = {};
    for (int64_t j = 0; j < weight.columns; j += kPanelColumns) {
      const int64_t present = lesser(kPanelColumns, weight.columns - j);
      load_floats(weight, v, j, present, row);
      for (int64_t i = present; i < kPanelColumns; ++i) row[i] = 0;
      for (int64_t i = 0; i < kPanelColumns; i += kLanes) squares += load(row + i) * load(row + i);
    }
    norms[v] = static_cast<float>(horizontal_sum(squares));
  }
}

// Folds the logits of a tile and turns them into factors; rebases the sums of rows whose largest logit rises.
void fold_tile(const FisherSumsArgs& args, const Transform& transform, const int64_t* rows, int64_t count,
               int64_t block, int64_t columns, int64_t tile, int width, const float* norms /* [V] */,
               const Workspace& ws) {
  const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
  const int64_t first = args.head.vocab_start;
  for (int64_t i = 0; i < count; ++i) {
    float* z = ws.factors + i * kTile;
    LaneState& lanes = ws.lanes[i];
    Top& top = ws.tops[i];
    transform(z, width, tile);
    const int64_t target = args.head.targets[rows[i]] - first - tile;
    if (target >= 0 && target < width) lanes.target = z[target];
    fold(z, n, first + tile, lanes);
    if (lanes.max > top.logit) {
      raise(args, transform, rows[i], top, lanes.max, block * columns, ws.sums + i * columns);
      top = {lanes.max, lanes.index - first};
    }
    if (top.column >= 0) {
      to_factors(args, transform, rows[i], tile, width, top, block * kTile, norms + tile, z);
    } else {  // nothing finite yet
      for (int64_t k = 0; k <= args.probes; ++k) memset(z + k * block * kTile, 0, 4 * n);
    }
  }
}

// Runs one task of `count` rows.
void run_block(const FisherSumsArgs& args, const Inner& inner, const Transform& transform, const int64_t* rows,
               int64_t count, int64_t block, int64_t columns, const float* norms /* [V] */, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const int64_t n = head.hidden.rows, depth = head.weight.columns;
  const int64_t whole = pack_block(head, inner, rows, count, ws.hidden);
  for (int64_t i = 0; i < count; ++i) {
    clear(ws.states[i]);
    ws.tops[i] = {-INFINITY, -1};
  }
  memset(ws.factors, 0, 4 * (args.probes + 1) * block * kTile);
  memset(ws.sums, 0, 4 * (args.probes + 1) * block * columns);
  const int64_t split_columns = ceil_div(ceil_div(head.weight.rows, kTile), kFoldSplits) * kTile;
  for (int64_t first = 0; first < head.weight.rows; first += split_columns) {
    const int64_t last = lesser(first + split_columns, head.weight.rows);
    for (int64_t i = 0; i < count; ++i) clear(ws.lanes[i]);
    for (int64_t tile = first; tile < last; tile += kTile) {
      const int width = static_cast<int>(lesser(kTile, last - tile));
      pack_values(head.weight, tile, width, ws.values);
      multiply_tile(head, inner, ws.hidden, whole, tile, width, ws.weights, ws.factors);
      fold_tile(args, transform, rows, count, block, columns, tile, width, norms, ws);
      for (int64_t k = 0; k <= args.probes; ++k) {
        add_values(head.weight, ws.factors + k * block * kTile, whole, width, ws.values, ws.split,
                   ws.sums + k * block * columns, k > 0 && rounds(head));
      }
    }
    for (int64_t i = 0; i < count; ++i) merge(ws.states[i], reduce(ws.lanes[i]));
  }
  for (int64_t i = 0; i < count; ++i) {
    write_state(ws.states + i, rows[i], n, args.state, args.index);
    for (int64_t k = 0; k <= args.probes; ++k) {
      memcpy(args.sums + (k * n + rows[i]) * depth, ws.sums + (k * block + i) * columns, 4 * depth);
    }
  }
}

}  // namespace

bool fisher_sums(const FisherSumsArgs& args) {
  const HeadArgs& head = args.head;
  const int64_t n = head.hidden.rows, depth = head.weight.columns;
  const int64_t vectors = ceil_div(head.weight.rows, kLanes) * kLanes;
  Scratch row_scratch(8 * n), norm_scratch(4 * vectors);
  if (row_scratch.missing() || norm_scratch.missing()) return false;
  int64_t* rows = row_scratch.as<int64_t>();
  float* norms = norm_scratch.as<float>();  // padded with 0
  memset(args.squares, 0, 8 * n);
  memset(args.signed_sums, 0, 8 * args.probes * n);
  const int64_t scored = scored_rows(head, rows, [&](int64_t i) {
    write_state(nullptr, i, n, args.state, args.index);
    for (int64_t k = 0; k <= args.probes; ++k) memset(args.sums + (k * n + i) * depth, 0, 4 * depth);
  });
  if (scored == 0) return true;
  memset(norms, 0, 4 * vectors);
  row_norms(head, norms);

  const Inner inner = inner_dimension(head);
  const Transform transform(head);
  const int64_t columns = value_columns(depth), block = rows_of_block(head, scored, kBlockRows);
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(block * inner.units),
                     arena.take<float>(kTile * inner.depth),
                     arena.take<float>(kTile * columns),
                     arena.take<float>(kTile * kPanelRows),
                     arena.take<float>((args.probes + 1) * block * kTile),
                     arena.take<float>((args.probes + 1) * block * columns),
                     arena.take<Top>(block),
                     arena.take<LaneState>(block),
                     arena.take<RowState>(block)};
  };
  return run_tasks(head.threads, ceil_div(scored, block), carve, [&](int64_t task, const Workspace& ws) {
    const int64_t begin = task * block, count = lesser(block, scored - begin);
    run_block(args, inner, transform, rows + begin, count, block, columns, norms, ws);
  });
}

}  // namespace acqcore::ACQCORE_ISA
