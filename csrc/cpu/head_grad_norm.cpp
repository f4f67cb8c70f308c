// Norms of per-sample head gradients G = sum_t delta_t h_t^T (weights included in delta), in the form for long samples.
//
// A task is a group of samples times a range of the vocabulary. For each tile it forms delta exactly (delta.h), then
// the tile's rows of G, a tile x D product per sample, and immediately adds up their squares. The shares, one double
// per sample and range, are added in order, so results do not depend on threads or on other samples.
#include "delta.h"
#include "isa.h"
#include "tasks.h"

namespace acqcore::ACQCORE_ISA {
namespace {

constexpr int64_t kRanges = 8;
constexpr int64_t kGroupRows = 256;  // samples are grouped until they have this many rows

// One sample of a group.
struct Sample {
  const int64_t* rows;  // scored rows
  int64_t count;        // number of scored rows
  int64_t first;        // its first row among the group's panels
  float* keys;          // h as panels [count, kPanelColumns]; with a bias, the last column is ones

  int64_t padded() const { return ceil_div(count, kPanelRows) * kPanelRows; }
};

// Per-thread scratch, sized for the largest group.
struct Workspace {
  float* hidden;   // packed panels [rows / kPanelRows, units, kPanelRows]
  float* weights;  // [kTile, depth]
  float* delta;    // [rows, kTile], and one more row that panels may read
  float* keys;     // of all samples
  DeltaRow* delta_rows;
  Sample* samples;  // of the group
};

// The workspace sizes that a group needs.
struct Size {
  int64_t rows = 0, keys = 0;

  void cover(const Size& other) {
    rows = greater(rows, other.rows);
    keys = greater(keys, other.keys);
  }
};

int64_t key_columns(const HeadArgs& head) {
  return ceil_div(head.hidden.columns + (head.bias ? 1 : 0), kPanelColumns) * kPanelColumns;
}

void add_sample(const HeadGradNormArgs& args, int64_t count, Size& size) {
  size.rows += ceil_div(count, kPanelRows) * kPanelRows;
  size.keys += count * key_columns(args.head);
}

void fill_keys(const HeadArgs& head, const Sample& sample) {
  const int64_t d = head.hidden.columns;
  for (int64_t j = 0; j < key_columns(head); j += kPanelColumns) {
    for (int64_t t = 0; t < sample.count; ++t) {
      float* row = sample.keys + j * sample.count + t * kPanelColumns;
      const int64_t present = greater(0, lesser(kPanelColumns, d - j));
      load_floats(head.hidden, sample.rows[t], j, present, row);
      for (int64_t i = present; i < kPanelColumns; ++i) row[i] = head.bias && j + i == d ? 1.0f : 0.0f;
    }
  }
}

// Squared norm of the tile's rows of G.
double share_of_tile(const HeadArgs& head, const Sample& sample, int width, const Workspace& ws) {
  const float* delta = ws.delta + sample.first * kTile;
  float block[kPanelRows * kPanelColumns];
  double share = 0;
  for (int64_t j = 0; j < key_columns(head); j += kPanelColumns) {
    for (int v = 0; v < width; v += kPanelRows) {
      panel_product<false, ByColumns<kTile>>(delta + v, sample.keys + j * sample.count, sample.count, false, block,
                                             kPanelColumns);
      const int present = static_cast<int>(lesser(kPanelRows, width - v));  // the rest lie beyond the tile
      Vec sum{};
      for (int i = 0; i < present * kPanelColumns; i += kLanes) sum += load(block + i) * load(block + i);
      share += horizontal_sum(sum);
    }
  }
  return share;
}

// Runs one task: samples [begin, end) against columns [first, last) of the vocabulary.
void run_task(const HeadGradNormArgs& args, const Inner& inner, const Transform& transform, const int64_t* rows,
              const int64_t* bounds, int64_t begin, int64_t end, int64_t first, int64_t last, const Workspace& ws,
              double* shares /* [samples, kRanges], from this range on */) {
  const HeadArgs& head = args.head;
  int64_t total = 0;
  float* keys = ws.keys;
  for (int64_t s = begin; s < end; ++s) {
    Sample& sample = ws.samples[s - begin];
    sample = {rows + bounds[s], bounds[s + 1] - bounds[s], total, keys};
    for (int64_t i = 0; i < sample.padded(); i += kPanelRows) {
      const int present = static_cast<int>(lesser(kPanelRows, sample.count - i));
      pack_rows(head.hidden, sample.rows + i, present, inner.pairs, inner.units, ws.hidden + (total + i) * inner.units);
    }
    for (int64_t i = 0; i < sample.padded(); ++i) {
      ws.delta_rows[total + i] = i < sample.count ? delta_row(head, args.state, args.index, sample.rows[i],
                                                              args.weights[sample.rows[i]])
                                                  : padding_row();
    }
    fill_keys(head, sample);
    total += sample.padded();
    keys += sample.count * key_columns(head);
    shares[s * kRanges] = 0;
  }
  for (int64_t tile = first; tile < last; tile += kTile) {
    const int width = static_cast<int>(lesser(kTile, last - tile));
    delta_tile(head, inner, transform, ws.delta_rows, total, ws.hidden, tile, width, ws.weights, ws.delta);
    for (int64_t s = begin; s < end; ++s) {
      shares[s * kRanges] += share_of_tile(head, ws.samples[s - begin], width, ws);
    }
  }
}

}  // namespace

bool head_grad_norm(const HeadGradNormArgs& args) {
  const HeadArgs& head = args.head;
  if (args.samples == 0) return true;
  Scratch list_scratch(8 * (head.hidden.rows + 3 * args.samples + 2));
  if (list_scratch.missing()) return false;
  int64_t* rows = list_scratch.as<int64_t>();      // scored rows by sample
  int64_t* bounds = rows + head.hidden.rows;       // [samples + 1], each sample's range in `rows`
  int64_t* groups = bounds + args.samples + 1;     // [group_count + 1], first sample of each group
  int64_t scored = 0, group_count = 0, most = 1;
  Size size, group;
  for (int64_t s = 0; s < args.samples; ++s) {
    bounds[s] = scored;
    for (int64_t i = args.bounds[2 * s]; i < args.bounds[2 * s + 1]; ++i) {
      if (head.targets[i] != -100) rows[scored++] = i;
    }
    if (s == 0 || group.rows >= kGroupRows) {
      groups[group_count++] = s;
      group = Size();
    }
    add_sample(args, scored - bounds[s], group);
    size.cover(group);
    most = greater(most, s + 1 - groups[group_count - 1]);
  }
  bounds[args.samples] = scored;
  groups[group_count] = args.samples;

  const Inner inner = inner_dimension(head);
  const Transform transform(head);
  const int64_t columns = ceil_div(ceil_div(head.weight.rows, kTile), kRanges) * kTile;
  const int64_t ranges = ceil_div(head.weight.rows, columns);
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(size.rows * inner.units),
                     arena.take<float>(kTile * inner.depth),
                     arena.take<float>((size.rows + 1) * kTile),
                     arena.take<float>(size.keys),
                     arena.take<DeltaRow>(size.rows),
                     arena.take<Sample>(most)};
  };
  Scratch share_scratch(8 * args.samples * kRanges);
  if (share_scratch.missing()) return false;
  double* shares = share_scratch.as<double>();
  const auto run = [&](int64_t task, const Workspace& ws) {
    const int64_t g = task / ranges, range = task % ranges;
    run_task(args, inner, transform, rows, bounds, groups[g], groups[g + 1], range * columns,
             lesser((range + 1) * columns, head.weight.rows), ws, shares + range);
  };
  if (!run_tasks(head.threads, group_count * ranges, carve, run)) return false;
  for (int64_t s = 0; s < args.samples; ++s) {
    args.squared[s] = 0;
    for (int64_t range = 0; range < ranges; ++range) args.squared[s] += shares[s * kRanges + range];
  }
  return true;
}

}  // namespace acqcore::ACQCORE_ISA
