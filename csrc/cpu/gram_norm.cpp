// Norms of per-sample head gradients from Gram matrices computed with the statistics: ||sum_t w_t delta_t h_t^T||^2 =
// sum_st <h_s, h_t> (c_s c_t products_st + sum_u delta_s[u] delta_t[u]), u over the sample's distinct targets.
//
// A task is a sample. The logits of its targets' columns, at most T of V, are recomputed; their deltas are exact as in
// delta.h and form a Gram of their own (gram.h). <h_s, h_t> is contracted block by block as it is computed.
#include "gram.h"
#include "isa.h"
#include "tasks.h"

namespace acqcore::ACQCORE_ISA {
namespace {

// A row of a sample.
struct Row {
  int64_t number;
  int64_t place;     // of its target among the sample's distinct ones, -1 if not in this weight
  bool top;          // the target is the largest logit
  float max;         // over the vocabulary
  float e_scale;     // weight slope / (Z 2^40), for exp_above<40>
  float at_target;   // -R / Z weight slope if the target is the maximum, else added to the target's p
  double product_scale;
};

// Per-thread scratch, sized for the longest sample.
struct Workspace {
  Row* rows;          // [padded]
  int64_t* columns;   // [padded], distinct targets in this weight, ascending
  float* bias;        // [kTile], of a tile's columns
  float* hidden;      // [padded / kPanelRows, units, kPanelRows]
  float* right;       // [units, kPanelColumns]
  float* delta;       // [padded, kTile]
  float* split;       // [GramLayout::scratch]
  float* gram;        // of the deltas
};

// out [kPanelRows, kPanelColumns] (row stride `stride`) = a packed panel of hidden states times one of columns.
void multiply(const Inner& inner, const float* left, const float* right, float* out, int64_t stride) {
  if (inner.pairs) {
    panel_product<kHasBf16Product>(left, right, inner.units, false, out, stride);
  } else {
    panel_product<false>(left, right, inner.units, false, out, stride);
  }
}

// Turns a row's logits at a tile's columns into delta times weight, in place; pads the last vector with zeros.
void to_delta(const Row& row, const Transform& transform, int64_t tile, int width, float* z) {
  const int64_t place = row.place - tile;
  const bool here = place >= 0 && place < width;
  const float inverse = transform.capped ? 1 / transform.after : 0;  // z * inverse = tanh
  const float at_place = here && transform.capped ? z[place] * inverse : 0;  // not -inf times 0
  for (int i = 0; i < width; i += kLanes) {
    const Vec t = load(z + i) * inverse;
    Vec x = load(z + i) - row.max;
    const Vec delta = exp_above<kShift>(x, kLowest) * row.e_scale;
    store(z + i, delta == 0 ? Vec{} : delta * (1.0f - t * t));  // t is not finite for an absent logit
  }
  if (here) z[place] = (row.top ? 0 : z[place]) + row.at_target * (1 - at_place * at_place);
}

// Computes the Gram of the deltas at the sample's targets into ws.gram.
void special_gram(const GramNormArgs& args, const Inner& inner, const Workspace& ws, int64_t count,
                  int64_t column_count) {
  const HeadArgs& head = args.head;
  const GramLayout layout(count, inner.pairs);
  memset(ws.gram, 0, 4 * layout.elements());
  Transform transform(head);
  for (int64_t tile = 0; tile < column_count; tile += kTile) {
    const int width = static_cast<int>(lesser(kTile, column_count - tile));
    const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
    for (int i = 0; head.bias && i < width; ++i) ws.bias[i] = head.bias[ws.columns[tile + i]];
    transform.bias = head.bias ? ws.bias : nullptr;
    for (int j = 0; j < width; j += kPanelColumns) {
      const int present = static_cast<int>(lesser(kPanelColumns, width - j));
      pack_panel(head.weight, ws.columns + tile + j, 0, present, kPanelColumns, inner.pairs, 0, inner.units, ws.right);
      for (int64_t i = 0; i < count; i += kPanelRows) {
        multiply(inner, ws.hidden + i * inner.units, ws.right, ws.delta + i * kTile + j, kTile);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      float* z = ws.delta + i * kTile;
      transform(z, width, 0);
      to_delta(ws.rows[i], transform, tile, width, z);
    }
    for (int64_t i = count; i < layout.padded; ++i) memset(ws.delta + i * kTile, 0, 4 * n);
    add_to_gram(ws.delta, layout, n, ws.gram, ws.split);
  }
}

// The squared norm of one sample.
double norm_of(const GramNormArgs& args, const Inner& inner, const Workspace& ws, int64_t begin, int64_t end,
               const float* products /* [T, T] */) {
  const HeadArgs& head = args.head;
  const int64_t n = head.hidden.rows, length = end - begin;
  int64_t count = 0, column_count = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (head.targets[i] == -100) continue;
    const double max = args.state[i], r = args.state[2 * n + i];
    const double slope = args.weights[i] * head.scale / head.temperature / (1 + r);
    const bool top = head.targets[i] == args.index[i];
    const int64_t target = head.targets[i] - head.vocab_start;
    ws.rows[count++] = {i,
                        -1,
                        top,
                        static_cast<float>(max),
                        static_cast<float>(slope * 0x1p-40),
                        static_cast<float>(top ? -r * slope : -(1 + r) * slope),
                        slope * exp(args.local_max[i] - max)};
    if (target >= 0 && target < head.weight.rows) ws.columns[column_count++] = target;
  }
  const int64_t distinct = sort_distinct(ws.columns, column_count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t target = head.targets[ws.rows[i].number] - head.vocab_start;
    const int64_t place = lower_bound(ws.columns, distinct, target);
    if (place < distinct && ws.columns[place] == target) ws.rows[i].place = place;
  }
  int64_t numbers[kPanelColumns];
  for (int64_t i = 0; i < count; i += kPanelRows) {
    const int present = static_cast<int>(lesser(kPanelRows, count - i));
    for (int k = 0; k < present; ++k) numbers[k] = ws.rows[i + k].number;
    pack_rows(head.hidden, numbers, present, inner.pairs, inner.units, ws.hidden + i * inner.units);
  }
  special_gram(args, inner, ws, count, distinct);

  const GramLayout layout(count, inner.pairs);
  const float one = head.bias ? 1.0f : 0.0f;
  float keys[kPanelRows * kPanelColumns];
  double total = 0;
  for (int64_t j = 0; j < count; j += kPanelColumns) {
    const int present = static_cast<int>(lesser(kPanelColumns, count - j));
    for (int k = 0; k < present; ++k) numbers[k] = ws.rows[j + k].number;
    pack_panel(head.hidden, numbers, 0, present, kPanelColumns, inner.pairs, 0, inner.units, ws.right);
    for (int64_t i = 0; i < j + present; i += kPanelRows) {
      multiply(inner, ws.hidden + i * inner.units, ws.right, keys, kPanelColumns);
      for (int64_t s = i; s < lesser(i + kPanelRows, count); ++s) {
        const float* special = ws.gram + layout.row(s);
        const float* row = products + (ws.rows[s].number - begin) * length - begin;
        double sum = 0;
        for (int64_t t = greater(j, s); t < j + present; ++t) {
          const double product = row[ws.rows[t].number] * ws.rows[t].product_scale * ws.rows[s].product_scale;
          const double key = keys[(s - i) * kPanelColumns + t - j] + one;
          sum += (t == s ? 1 : 2) * key * (product + special[t]);
        }
        total += sum;
      }
    }
  }
  return total;
}

}  // namespace

bool gram_norm(const GramNormArgs& args) {
  const GramArgs& gram = args.gram;
  Scratch start_scratch(8 * gram.samples);
  if (start_scratch.missing()) return false;
  int64_t* starts = start_scratch.as<int64_t>();
  int64_t longest = 0, product = 0;
  for (int64_t s = 0; s < gram.samples; ++s) {
    const int64_t length = gram.bounds[2 * s + 1] - gram.bounds[2 * s];
    starts[s] = product;
    product += length * length;
    longest = greater(longest, length);
  }
  const Inner inner = inner_dimension(args.head);
  const GramLayout largest(longest, inner.pairs);
  const int64_t rows = greater(ceil_div(longest, kPanelRows) * kPanelRows, largest.padded);
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<Row>(rows),
                     arena.take<int64_t>(rows),
                     arena.take<float>(kTile),
                     arena.take<float>(rows * inner.units),
                     arena.take<float>(inner.units * kPanelColumns),
                     arena.take<float>(rows * kTile),
                     arena.take<float>(largest.scratch()),
                     arena.take<float>(largest.elements())};
  };
  return run_tasks(args.head.threads, gram.samples, carve, [&](int64_t s, const Workspace& ws) {
    args.squared[s] = norm_of(args, inner, ws, gram.bounds[2 * s], gram.bounds[2 * s + 1],
                              static_cast<const float*>(gram.products) + starts[s]);
  });
}

}  // namespace acqcore::ACQCORE_ISA
