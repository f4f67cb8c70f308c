// Statistics of a mixture of K softmax rows (MC dropout or ensembles) without materializing the [N, K, V] logits.
//
// The entropy of the mean distribution needs every draw's normalizer first, so the vocabulary is visited twice: the
// first pass folds each draw's logits into its row state (fold.h), the second forms the mean distribution. If the
// product is computed K times, the first pass keeps its logits for a chunk of rows in bounded scratch; the block form,
// which computes one product for all draws, recomputes it. Measured at N=1024, D=576, V=49152, K=8, in multiples of a
// bare hidden W^T: element 3.9 kept, 7.0 recomputed; block 1.9 kept, 1.55 recomputed.
//
//   element: draws are additional rows multiplied by each packed weight tile.
//   block:   each block of columns is multiplied once, and draws are sums of those partial products.
#include "dropout.h"
#include "fold.h"
#include "parallel.h"
#include "tile.h"

namespace acqcore::ACQCORE_ISA {
namespace {

constexpr int64_t kMaxSplits = 32;
constexpr int64_t kPackedBytes = 16 << 20;   // limit on packed hidden states
constexpr int64_t kKeptBytes = 128 << 20;    // limit on logits kept between the passes
constexpr int64_t kStateBytes = 16 << 20;    // limit on the splits' states
constexpr float kNone = -87.0f;              // below this, exp (1e-38) is rounded to 0
constexpr int64_t kBufferBytes = 4 << 20;    // limit on a tile's incomplete logits
constexpr int kPlane = kPanelRows * kTile + 2 * kLanes;  // a row panel's logits in one draw, padded against aliasing

struct Plan {
  Inner inner;
  bool keep;           // keep logits between the passes
  bool buffered;       // a tile's logits are complete only after several loops over the rows
  int64_t tiles;
  int64_t split_tiles;
  int64_t splits;
  int64_t chunk_rows;  // rows whose hidden states are packed together
  int64_t block_rows;  // rows per task
  int64_t planes;      // hidden panels per panel of rows: K, or 1 in the block form
  int64_t block_units; // units per block
  int64_t blocks;      // B, blocks per row
};

Plan make_plan(const MixtureStatsArgs& args, int64_t scored) {
  Plan p;
  const bool block = args.dropout.form == Draws::kBlock;
  p.inner = inner_dimension(args.head);
  p.block_units = block ? args.dropout.block : 1;
  if (block) {
    if (p.inner.pairs && args.dropout.block % 2 != 0) {  // a pair would belong to two blocks
      p.inner.pairs = false;
      p.inner.units = args.head.hidden.columns;
    }
    if (p.inner.pairs) p.block_units /= 2;
    p.block_units = lesser(p.block_units, greater(1, p.inner.units));
    p.inner.depth = lesser(greater(1, kDepth / p.block_units) * p.block_units,
                           ceil_div(greater(1, p.inner.units), p.block_units) * p.block_units);
  }
  p.blocks = ceil_div(greater(1, p.inner.units), p.block_units);
  p.planes = block ? 1 : args.draws;
  p.keep = !block;
  p.buffered = p.inner.depth < p.inner.units || args.members > 1;
  p.tiles = ceil_div(args.weights[0].rows, kTile);
  p.split_tiles = ceil_div(p.tiles, kMaxSplits);
  p.splits = ceil_div(p.tiles, p.split_tiles);
  const int64_t row_bytes = 4 * p.planes * greater(1, p.inner.units);
  int64_t fitting = kPackedBytes / row_bytes;
  if (p.keep) fitting = lesser(fitting, kKeptBytes / (4 * args.draws * p.tiles * kTile));
  fitting = lesser(fitting, kStateBytes / (int64_t(sizeof(RowState)) * args.draws * p.splits));
  const int64_t needed = ceil_div(scored, kPanelRows) * kPanelRows;
  p.chunk_rows = lesser(needed, greater(1, fitting / kPanelRows) * kPanelRows);
  const int64_t row_blocks = greater(1, ceil_div(4 * args.head.threads, p.splits));
  p.block_rows = ceil_div(ceil_div(p.chunk_rows, row_blocks), kPanelRows) * kPanelRows;
  if (p.buffered) {
    const int64_t waiting = kBufferBytes / (4 * kPlane * args.draws) * kPanelRows;
    p.block_rows = lesser(p.block_rows, greater(kPanelRows, waiting));
  }
  return p;
}

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

// Data of a chunk that the threads share.
struct Chunk {
  const int64_t* rows;   // row numbers
  int64_t count;
  float* hidden;         // [panels, planes, units, kPanelRows]
  bool* keep;            // block form: [rows, K, blocks]
  float* kept;           // [tiles, rows, K, kTile], or null
  RowState* states;      // [splits, rows, K]
  Normaliser* norms;     // [rows, K]
  Mixture* mixtures;     // [splits, rows]
};

// Per-thread scratch.
struct Workspace {
  float* weights;     // [kTile / kPanelColumns, depth, kPanelColumns]
  float* logits;      // [1 or block_rows / kPanelRows, K, kPanelRows, kTile]
  float* partial;     // block form: [depth / block_units, kPanelRows, kTile]
  LaneState* lanes;   // [block_rows, K]
  bool* keep;         // [2 units]
};

// Packs a panel of rows: once per draw or, in the block form, once with every draw's block masks.
void pack_draws(const MixtureStatsArgs& args, const Plan& plan, const Chunk& chunk, int64_t panel, bool* keep) {
  const int64_t first = panel * kPanelRows;
  const int count = static_cast<int>(lesser(kPanelRows, chunk.count - first));
  const int64_t plane = plan.inner.units * kPanelRows;
  float* out = chunk.hidden + panel * plan.planes * plane;
  const int64_t* rows = chunk.rows + first;
  const Dropout& dropout = args.dropout;
  const auto pack = [&](const int64_t* numbers, float* to) {
    pack_rows(args.head.hidden, numbers, count, plan.inner.pairs, plan.inner.units, to);
  };
  if (dropout.form == Draws::kGiven) {
    for (int k = 0; k < args.draws; ++k) {
      int64_t numbers[kPanelRows];
      for (int i = 0; i < count; ++i) numbers[i] = k * args.rows + rows[i];
      pack(numbers, out + k * plane);
    }
  } else if (dropout.form == Draws::kElement) {
    float* whole = out + (args.draws - 1) * plane;  // the last draw is masked in place
    pack(rows, whole);
    const int64_t columns = args.head.hidden.columns;
    for (int64_t c = columns; c < 2 * plan.inner.units; ++c) keep[c] = true;  // the zeros that pad pairs
    for (int k = 0; k < args.draws; ++k) {
      for (int i = 0; i < kPanelRows; ++i) {
        if (i < count) keep_units(dropout, rows[i], k, 0, columns, keep);
        mask_row(whole, i, keep, plan.inner.units, plan.inner.pairs, out + k * plane);
      }
    }
  } else {
    pack(rows, out);
    for (int i = 0; i < count; ++i) {
      for (int k = 0; k < args.draws; ++k) {
        keep_units(dropout, rows[i], k, 0, plan.blocks, chunk.keep + ((first + i) * args.draws + k) * plan.blocks);
      }
    }
  }
}

// z = or += sign part.
template <int sign>
void add(const float* part, int width, bool accumulate, float* z) {
  for (int v = 0; v < width; v += kLanes) {
    const Vec x = load(part + v);
    store(z + v, accumulate ? (sign > 0 ? load(z + v) + x : load(z + v) - x) : x);
  }
}

// z [draws, kPlane] of one row = or += its partial products under each draw's mask: adds the kept ones, or subtracts
// the dropped ones from the total, whichever are fewer.
void combine(const float* partial /* [blocks, kPlane] */, int64_t blocks, const bool* keep /* [draws, stride] */,
             int64_t stride, int draws, int width, bool accumulate, float* z) {
  alignas(64) float all[kTile];
  for (int v = 0; v < width; v += kLanes) {
    Vec sums[4] = {};  // four short chains: with the subtractions, no less accurate than one long chain
    for (int64_t b = 0; b < blocks; ++b) sums[b % 4] += load(partial + b * kPlane + v);
    store(all + v, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  for (int k = 0; k < draws; ++k) {
    const bool* kept = keep + k * stride;
    float* to = z + k * kPlane;
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; ++b) count += kept[b];
    if (2 * count > blocks) {
      add<1>(all, width, accumulate, to);
      for (int64_t b = 0; b < blocks; ++b) {
        if (!kept[b]) add<-1>(partial + b * kPlane, width, true, to);
      }
    } else {
      if (!accumulate) memset(to, 0, 4 * kTile);
      for (int64_t b = 0; b < blocks; ++b) {
        if (kept[b]) add<1>(partial + b * kPlane, width, true, to);
      }
    }
  }
}

// Multiplies a panel of rows by one member's packed weights, units [k0, k0 + k); the block form writes the products of
// each block to ws.partial.
void multiply(const MixtureStatsArgs& args, const Plan& plan, const Chunk& chunk, const Workspace& ws, int64_t panel,
              int member, int width, int64_t k0, int64_t k, float* z /* [K, kPanelRows, kTile] */) {
  const int64_t plane = plan.inner.units * kPanelRows;
  const float* hidden = chunk.hidden + panel * plan.planes * plane + k0 * kPanelRows;
  if (args.dropout.form != Draws::kBlock) {
    const int first = args.members > 1 ? member : 0;
    const int last = args.members > 1 ? member + 1 : args.draws;
    for (int d = first; d < last; ++d) {
      multiply_panel(plan.inner, hidden + d * plane, ws.weights, width, k, k0 > 0, z + d * kPlane);
    }
    return;
  }
  const int64_t blocks = ceil_div(k, plan.block_units);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * plan.block_units;
    multiply_panel(plan.inner, hidden + begin * kPanelRows, ws.weights + begin * kPanelColumns, width,
                   lesser(plan.block_units, k - begin), false, ws.partial + b * kPlane);
  }
}

// Calls visit(row, tile number, width, z [K, kPanelRows, kTile] at that row) with complete products z for rows
// [begin, end) of the chunk and all tiles of a split.
template <typename Visit>
void for_each_tile(const MixtureStatsArgs& args, const Plan& plan, const Chunk& chunk, const Workspace& ws,
                   int64_t begin, int64_t end, int64_t split, const Visit& visit) {
  const int64_t vocabulary = args.weights[0].rows;
  const int64_t last_tile = lesser((split + 1) * plan.split_tiles, plan.tiles);
  for (int64_t t = split * plan.split_tiles; t < last_tile; ++t) {
    const int width = static_cast<int>(lesser(kTile, vocabulary - t * kTile));
    for (int m = 0; m < args.members; ++m) {
      for (int64_t k0 = 0; k0 < plan.inner.units || k0 == 0; k0 += plan.inner.depth) {
        const int64_t k = lesser(plan.inner.depth, plan.inner.units - k0);
        const bool whole = m + 1 == args.members && k0 + plan.inner.depth >= plan.inner.units;
        pack_weights(args.weights[m], plan.inner, t * kTile, width, k0, k, ws.weights);
        for (int64_t row = begin; row < end; row += kPanelRows) {
          float* z = ws.logits + (plan.buffered ? (row - begin) / kPanelRows * args.draws * kPlane : 0);
          multiply(args, plan, chunk, ws, row / kPanelRows, m, width, k0, k, z);
          for (int64_t i = row; i < lesser(row + kPanelRows, end); ++i) {
            float* of_row = z + (i - row) * kTile;
            if (args.dropout.form == Draws::kBlock) {
              combine(ws.partial + (i - row) * kTile, ceil_div(k, plan.block_units),
                      chunk.keep + i * args.draws * plan.blocks + k0 / plan.block_units, plan.blocks, args.draws, width,
                      k0 > 0, of_row);
            }
            if (whole) visit(i, t, width, of_row);  // while the row is in L1
          }
        }
      }
    }
  }
}

// Adds the mixture of z[k][0, n) to `sums`; z becomes log-probabilities. Computed relative to top = max_k log p_k, the
// terms of `information`, `reverse` and `spread` are exactly 0 where the draws agree.
void mix(float* z, int64_t stride, int draws, int n, const Normaliser* norms /* [K] */, Mixture& sums) {
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

// First pass: states of every draw of rows [begin, end) over one split.
void fold_split(const MixtureStatsArgs& args, const Plan& plan, const Transform* transforms, const Chunk& chunk,
                const Workspace& ws, int64_t begin, int64_t end, int64_t split) {
  for (int64_t i = 0; i < (end - begin) * args.draws; ++i) clear(ws.lanes[i]);
  for_each_tile(args, plan, chunk, ws, begin, end, split, [&](int64_t row, int64_t tile, int width, float* z) {
    for (int k = 0; k < args.draws; ++k) {
      float* logits = z + k * kPlane;
      LaneState& lanes = ws.lanes[(row - begin) * args.draws + k];
      transforms[k](logits, width, tile * kTile);
      if (args.head.targets) {
        const int64_t target = args.head.targets[chunk.rows[row]] - args.head.vocab_start - tile * kTile;
        if (target >= 0 && target < width) lanes.target = logits[target];
      }
      const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
      fold(logits, n, args.head.vocab_start + tile * kTile, lanes);
      if (plan.keep) memcpy(chunk.kept + ((tile * chunk.count + row) * args.draws + k) * kTile, logits, 4 * n);
    }
  });
  RowState* states = chunk.states + (split * plan.chunk_rows + begin) * args.draws;
  for (int64_t i = 0; i < (end - begin) * args.draws; ++i) states[i] = reduce(ws.lanes[i]);
}

// Second pass: the mixture of rows [begin, end) over one split.
void mix_split(const MixtureStatsArgs& args, const Plan& plan, const Transform* transforms, const Chunk& chunk,
               const Workspace& ws, int64_t begin, int64_t end, int64_t split) {
  Mixture* mixtures = chunk.mixtures + split * plan.chunk_rows;
  for (int64_t i = begin; i < end; ++i) mixtures[i] = {};
  if (plan.keep) {
    const int64_t last_tile = lesser((split + 1) * plan.split_tiles, plan.tiles);
    for (int64_t t = split * plan.split_tiles; t < last_tile; ++t) {
      const int64_t width = lesser(kTile, args.weights[0].rows - t * kTile);
      for (int64_t i = begin; i < end; ++i) {
        float* z = chunk.kept + (t * chunk.count + i) * args.draws * kTile;
        mix(z, kTile, args.draws, static_cast<int>(ceil_div(width, kLanes) * kLanes), chunk.norms + i * args.draws,
            mixtures[i]);
      }
    }
    return;
  }
  for_each_tile(args, plan, chunk, ws, begin, end, split, [&](int64_t row, int64_t tile, int width, float* z) {
    for (int k = 0; k < args.draws; ++k) transforms[k](z + k * kPlane, width, tile * kTile);
    mix(z, kPlane, args.draws, static_cast<int>(ceil_div(width, kLanes) * kLanes), chunk.norms + row * args.draws,
        mixtures[row]);
  });
}

// Merges the splits of a row's draws and writes the part of its state that does not need the mixture.
void finish_draws(const MixtureStatsArgs& args, const Plan& plan, const Chunk& chunk, int64_t row) {
  double entropy = 0, top = -INFINITY, likelihood = 0;
  const int64_t n = args.rows, number = chunk.rows[row];
  for (int pass = 0; pass < 2; ++pass) {  // the target's largest log-probability, then the sum relative to it
    for (int k = 0; k < args.draws; ++k) {
      RowState& s = chunk.states[row * args.draws + k];
      if (pass == 0) {
        for (int64_t split = 1; split < plan.splits; ++split) {
          merge(s, chunk.states[(split * plan.chunk_rows + row) * args.draws + k]);
        }
        const double log_z = log1p(s.r);
        entropy += s.max == -INFINITY ? double(NAN) : log_z - s.s1 / (1 + s.r);
        chunk.norms[row * args.draws + k] = {s.max, static_cast<float>(log_z)};
        args.votes[k * n + number] = s.index;
      }
      const double logprob = double(s.target) - double(s.max) - log1p(s.r);
      if (pass == 0) {
        top = logprob > top ? logprob : top;
      } else {
        likelihood += exp(logprob - top);
      }
    }
  }
  args.state[number] = entropy / args.draws;
  args.state[3 * n + number] = top == -INFINITY ? top : top + ::log(likelihood / args.draws);
}

void finish_mixture(const MixtureStatsArgs& args, const Plan& plan, const Chunk& chunk, int64_t row) {
  Mixture total{};
  for (int64_t split = 0; split < plan.splits; ++split) {
    const Mixture& m = chunk.mixtures[split * plan.chunk_rows + row];
    total.information += m.information;
    total.reverse += m.reverse;
    total.sum_sq += m.sum_sq;
    total.spread += m.spread;
  }
  const int64_t n = args.rows, number = chunk.rows[row];
  args.state[n + number] = total.information;
  args.state[2 * n + number] = total.reverse;
  args.state[4 * n + number] = total.sum_sq;
  args.state[5 * n + number] = total.spread;
}

}  // namespace

bool dropout_mask(const DropoutMaskArgs& args) {
#pragma omp parallel for num_threads(args.threads)
  for (int64_t i = 0; i < args.draws * args.rows; ++i) {
    keep_units(args.dropout, i % args.rows, static_cast<int>(i / args.rows), args.site, args.units,
               args.keep + i * args.units);
  }
  return true;
}

bool mixture_stats(const MixtureStatsArgs& args) {
  const int64_t n = args.rows;
  Scratch row_scratch(8 * n);
  if (row_scratch.missing()) return false;
  int64_t* rows = row_scratch.as<int64_t>();
  int64_t scored = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (args.head.targets && args.head.targets[i] == -100) {
      for (int s = 0; s < 6; ++s) args.state[s * n + i] = NAN;
      for (int k = 0; k < args.draws; ++k) args.votes[k * n + i] = -1;
    } else {
      rows[scored++] = i;
    }
  }
  if (scored == 0) return true;

  const Plan plan = make_plan(args, scored);
  const int64_t planes = plan.buffered ? plan.block_rows / kPanelRows * args.draws : args.draws;
  const int64_t partials = args.dropout.form == Draws::kBlock ? plan.inner.depth / plan.block_units : 0;
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(kTile * plan.inner.depth), arena.take<float>(planes * kPlane),
                     arena.take<float>(partials * kPlane), arena.take<LaneState>(plan.block_rows * args.draws),
                     arena.take<bool>(2 * plan.inner.units + 4)};
  };
  Chunk chunk{};
  const auto carve_chunk = [&](Arena& arena) {
    chunk.hidden = arena.take<float>(plan.chunk_rows * plan.planes * plan.inner.units);
    chunk.keep = arena.take<bool>(partials ? plan.chunk_rows * args.draws * plan.blocks : 0);
    chunk.states = arena.take<RowState>(plan.splits * plan.chunk_rows * args.draws);
    chunk.norms = arena.take<Normaliser>(plan.chunk_rows * args.draws);
    chunk.mixtures = arena.take<Mixture>(plan.splits * plan.chunk_rows);
    chunk.kept = arena.take<float>(plan.keep ? plan.tiles * plan.chunk_rows * args.draws * kTile : 0);
  };
  Arena layout(nullptr), chunk_layout(nullptr);
  carve(layout);
  carve_chunk(chunk_layout);
  Scratch thread_scratch(args.head.threads * layout.used());
  Scratch chunk_scratch(chunk_layout.used());
  Scratch transform_scratch(args.draws * int64_t(sizeof(Transform)));
  if (thread_scratch.missing() || chunk_scratch.missing() || transform_scratch.missing()) return false;
  Arena chunk_arena(chunk_scratch.as<char>());
  carve_chunk(chunk_arena);
  Transform* transforms = transform_scratch.as<Transform>();
  for (int k = 0; k < args.draws; ++k) {
    HeadArgs head = args.head;
    head.bias = args.biases[args.members > 1 ? k : 0];
    transforms[k] = Transform(head, args.dropout.form == Draws::kGiven ? 1.0f : args.dropout.inverse_keep);
  }

  for (int64_t begin = 0; begin < scored; begin += plan.chunk_rows) {
    chunk.rows = rows + begin;
    chunk.count = lesser(plan.chunk_rows, scored - begin);
    const int64_t panels = ceil_div(chunk.count, kPanelRows);
    const int64_t blocks = ceil_div(chunk.count, plan.block_rows);
    const int64_t tasks = blocks * plan.splits;
#pragma omp parallel num_threads(args.head.threads)
    {
      const Tiles tiles;
      Arena arena(thread_scratch.as<char>() + thread_number() * layout.used());
      const Workspace ws = carve(arena);
#pragma omp for
      for (int64_t p = 0; p < panels; ++p) pack_draws(args, plan, chunk, p, ws.keep);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t first = task % blocks * plan.block_rows;
        fold_split(args, plan, transforms, chunk, ws, first, lesser(first + plan.block_rows, chunk.count), task / blocks);
      }
#pragma omp for
      for (int64_t i = 0; i < chunk.count; ++i) finish_draws(args, plan, chunk, i);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t first = task % blocks * plan.block_rows;
        mix_split(args, plan, transforms, chunk, ws, first, lesser(first + plan.block_rows, chunk.count), task / blocks);
      }
#pragma omp for
      for (int64_t i = 0; i < chunk.count; ++i) finish_mixture(args, plan, chunk, i);
    }
  }
  return true;
}

}  // namespace acqcore::ACQCORE_ISA
