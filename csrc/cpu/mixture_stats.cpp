// Statistics of a mixture of K softmax rows (MC dropout or ensembles) without materializing the [N, K, V] logits.
//
// The entropy of the mean distribution needs every draw's normalizer first. The first pass over the vocabulary folds each
// draw's logits into its row state (fold.h) and keeps them for a chunk of rows, the second forms the mean distribution.
// Draws are additional rows multiplied by each packed weight tile; block_mixture.cpp computes the block form. Keeping
// the logits takes 3.9 times a bare hidden W^T, recomputing the products 7.0 times (N=1024, D=576, V=49152, K=8).
#include "dropout.h"
#include "mixture.h"
#include "parallel.h"
#include "tile.h"

namespace acqcore::ACQCORE_ISA {

bool block_mixture(const MixtureStatsArgs& args);  // block_mixture.cpp

namespace {

constexpr int64_t kPackedBytes = 16 << 20;   // limit on packed hidden states
constexpr int64_t kKeptBytes = 128 << 20;    // limit on logits kept between the passes

struct Plan {
  Inner inner;
  bool buffered;       // a tile's logits are complete only after several loops over the rows
  int64_t tiles;
  int64_t split_tiles;
  int64_t splits;
  int64_t chunk_rows;  // rows whose hidden states are packed together
  int64_t block_rows;  // rows per task
};

Plan make_plan(const MixtureStatsArgs& args, int64_t scored) {
  Plan p;
  p.inner = inner_dimension(args.head);
  p.buffered = p.inner.depth < p.inner.units || args.members > 1;
  p.tiles = ceil_div(args.weights[0].rows, kTile);
  p.split_tiles = ceil_div(p.tiles, kMaxSplits);
  p.splits = ceil_div(p.tiles, p.split_tiles);
  int64_t fitting = kPackedBytes / (4 * args.draws * greater(1, p.inner.units));
  fitting = lesser(fitting, kKeptBytes / (4 * args.draws * p.tiles * kTile));
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

// Data of a chunk that the threads share.
struct Chunk {
  const int64_t* rows;   // row numbers
  int64_t count;
  float* hidden;         // [panels, K, units, kPanelRows]
  float* kept;           // [tiles, rows, K, kTile]
  RowState* states;      // [splits, rows, K]
  Normaliser* norms;     // [rows, K]
  Mixture* mixtures;     // [splits, rows]
};

// Per-thread scratch.
struct Workspace {
  float* weights;     // [kTile / kPanelColumns, depth, kPanelColumns]
  float* logits;      // [1 or block_rows / kPanelRows, K, kPlane], rows kTile apart
  LaneState* lanes;   // [block_rows, K]
  bool* keep;         // [2 units]
};

// Packs a panel of rows once per draw.
void pack_draws(const MixtureStatsArgs& args, const Plan& plan, const Chunk& chunk, int64_t panel, bool* keep) {
  const int64_t first = panel * kPanelRows;
  const int count = static_cast<int>(lesser(kPanelRows, chunk.count - first));
  const int64_t plane = plan.inner.units * kPanelRows;
  float* out = chunk.hidden + panel * args.draws * plane;
  const int64_t* rows = chunk.rows + first;
  const auto pack = [&](const int64_t* numbers, float* to) {
    pack_rows(args.head.hidden, numbers, count, plan.inner.pairs, plan.inner.units, to);
  };
  if (args.dropout.form == Draws::kGiven) {
    for (int k = 0; k < args.draws; ++k) {
      int64_t numbers[kPanelRows];
      for (int i = 0; i < count; ++i) numbers[i] = k * args.rows + rows[i];
      pack(numbers, out + k * plane);
    }
    return;
  }
  float* whole = out + (args.draws - 1) * plane;  // the last draw is masked in place
  pack(rows, whole);
  const int64_t columns = args.head.hidden.columns;
  for (int64_t c = columns; c < 2 * plan.inner.units; ++c) keep[c] = true;  // the zeros that pad pairs
  for (int k = 0; k < args.draws; ++k) {
    for (int i = 0; i < kPanelRows; ++i) {
      if (i < count) keep_units(args.dropout, rows[i], k, 0, columns, keep);
      mask_row(whole, i, keep, plan.inner.units, plan.inner.pairs, out + k * plane);
    }
  }
}

// Multiplies a panel of rows by one member's packed weights, units [k0, k0 + k).
void multiply(const MixtureStatsArgs& args, const Plan& plan, const Chunk& chunk, const Workspace& ws, int64_t panel,
              int member, int width, int64_t k0, int64_t k, float* z /* [K, kPlane] */) {
  const int64_t plane = plan.inner.units * kPanelRows;
  const float* hidden = chunk.hidden + panel * args.draws * plane + k0 * kPanelRows;
  const int first = args.members > 1 ? member : 0;
  const int last = args.members > 1 ? member + 1 : args.draws;
  for (int d = first; d < last; ++d) {
    multiply_panel(plan.inner, hidden + d * plane, ws.weights, width, k, k0 > 0, z + d * kPlane);
  }
}

// Folds a tile's complete logits of a row, and keeps them.
void fold_row(const MixtureStatsArgs& args, const Transform* transforms, const Chunk& chunk, int64_t row, int64_t tile,
              int width, float* z /* [K, kPlane] */, LaneState* lanes /* [K] */) {
  const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
  const HeadArgs& head = args.head;
  const int64_t first = head.vocab_start + tile * kTile;
  const int64_t target = head.targets ? head.targets[chunk.rows[row]] - first : -1;
  for (int k = 0; k < args.draws; ++k) {
    float* logits = z + k * kPlane;
    transforms[k](logits, width, tile * kTile);
    if (target >= 0 && target < width) lanes[k].target = logits[target];
    fold(logits, n, first, lanes[k]);
    memcpy(chunk.kept + ((tile * chunk.count + row) * args.draws + k) * kTile, logits, 4 * n);
  }
}

// First pass: states of every draw of rows [begin, end) over one split.
void fold_split(const MixtureStatsArgs& args, const Plan& plan, const Transform* transforms, const Chunk& chunk,
                const Workspace& ws, int64_t begin, int64_t end, int64_t split) {
  const int64_t vocabulary = args.weights[0].rows;
  for (int64_t i = 0; i < (end - begin) * args.draws; ++i) clear(ws.lanes[i]);
  for (int64_t t = split * plan.split_tiles; t < lesser((split + 1) * plan.split_tiles, plan.tiles); ++t) {
    const int width = static_cast<int>(lesser(kTile, vocabulary - t * kTile));
    for (int m = 0; m < args.members; ++m) {
      for (int64_t k0 = 0; k0 < plan.inner.units || k0 == 0; k0 += plan.inner.depth) {
        const int64_t k = lesser(plan.inner.depth, plan.inner.units - k0);
        const bool whole = m + 1 == args.members && k0 + plan.inner.depth >= plan.inner.units;
        pack_weights(args.weights[m], plan.inner, t * kTile, width, k0, k, ws.weights);
        for (int64_t row = begin; row < end; row += kPanelRows) {
          float* z = ws.logits + (plan.buffered ? (row - begin) / kPanelRows * args.draws * kPlane : 0);
          multiply(args, plan, chunk, ws, row / kPanelRows, m, width, k0, k, z);
          for (int64_t i = row; whole && i < lesser(row + kPanelRows, end); ++i) {  // while the row is in L1
            fold_row(args, transforms, chunk, i, t, width, z + (i - row) * kTile, ws.lanes + (i - begin) * args.draws);
          }
        }
      }
    }
  }
  RowState* states = chunk.states + (split * plan.chunk_rows + begin) * args.draws;
  for (int64_t i = 0; i < (end - begin) * args.draws; ++i) states[i] = reduce(ws.lanes[i]);
}

// Second pass: the mixture of rows [begin, end) over one split.
void mix_split(const MixtureStatsArgs& args, const Plan& plan, const Chunk& chunk, int64_t begin, int64_t end,
               int64_t split) {
  Mixture* mixtures = chunk.mixtures + split * plan.chunk_rows;
  for (int64_t i = begin; i < end; ++i) mixtures[i] = {};
  for (int64_t t = split * plan.split_tiles; t < lesser((split + 1) * plan.split_tiles, plan.tiles); ++t) {
    const int64_t width = lesser(kTile, args.weights[0].rows - t * kTile);
    for (int64_t i = begin; i < end; ++i) {
      float* z = chunk.kept + (t * chunk.count + i) * args.draws * kTile;
      mix(z, kTile, args.draws, static_cast<int>(ceil_div(width, kLanes) * kLanes), chunk.norms + i * args.draws,
          mixtures[i]);
    }
  }
}

// Merges the splits of a row's draws and writes what needs no mixture.
void merge_draws(const MixtureStatsArgs& args, const Plan& plan, const Chunk& chunk, int64_t row) {
  RowState* states = chunk.states + row * args.draws;
  for (int64_t split = 1; split < plan.splits; ++split) {
    for (int k = 0; k < args.draws; ++k) merge(states[k], states[split * plan.chunk_rows * args.draws + k]);
  }
  finish_draws(states, args.draws, chunk.rows[row], args.rows, chunk.norms + row * args.draws, args.state, args.votes);
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
  if (args.dropout.form == Draws::kBlock) return block_mixture(args);
  Scratch row_scratch(8 * args.rows);
  if (row_scratch.missing()) return false;
  int64_t* rows = row_scratch.as<int64_t>();
  const int64_t scored = list_rows(args, rows);
  if (scored == 0) return true;

  const Plan plan = make_plan(args, scored);
  const int64_t planes = plan.buffered ? plan.block_rows / kPanelRows * args.draws : args.draws;
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(kTile * plan.inner.depth), arena.take<float>(planes * kPlane),
                     arena.take<LaneState>(plan.block_rows * args.draws), arena.take<bool>(2 * plan.inner.units + 4)};
  };
  Chunk chunk{};
  const auto carve_chunk = [&](Arena& arena) {
    chunk.hidden = arena.take<float>(plan.chunk_rows * args.draws * plan.inner.units);
    chunk.states = arena.take<RowState>(plan.splits * plan.chunk_rows * args.draws);
    chunk.norms = arena.take<Normaliser>(plan.chunk_rows * args.draws);
    chunk.mixtures = arena.take<Mixture>(plan.splits * plan.chunk_rows);
    chunk.kept = arena.take<float>(plan.tiles * plan.chunk_rows * args.draws * kTile);
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
      for (int64_t i = 0; i < chunk.count; ++i) merge_draws(args, plan, chunk, i);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t first = task % blocks * plan.block_rows;
        mix_split(args, plan, chunk, first, lesser(first + plan.block_rows, chunk.count), task / blocks);
      }
#pragma omp for
      for (int64_t i = 0; i < chunk.count; ++i) {
        finish_mixture(chunk.mixtures + i, plan.splits, plan.chunk_rows, chunk.rows[i], args.rows, args.state);
      }
    }
  }
  return true;
}

}  // namespace acqcore::ACQCORE_ISA
