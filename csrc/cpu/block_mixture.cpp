// mixture_stats of block dropout: one product of each block of columns serves all draws (blocks.h).
//
// The entropy of the mean distribution needs every draw's normalizer first, so the weights are visited twice. The first
// visit is that of row_stats, which folds the draws beside the rows themselves. The second recomputes the products and
// forms the mean distribution: this takes 1.55 times a bare hidden W^T; keeping the draws' logits takes 1.9 times
// (N=1024, D=576, V=49152, K=8).
#include "blocks.h"
#include "isa.h"
#include "mixture.h"
#include "parallel.h"

namespace acqcore::ACQCORE_ISA {

bool row_stats(const RowStatsArgs& args);  // row_stats.cpp

namespace {

constexpr int64_t kPackedBytes = 16 << 20;  // limit on packed hidden states

struct Plan {
  Blocks blocks;
  bool deep;           // a tile's logits are complete only after several loops over the rows
  int64_t columns;     // per split
  int64_t splits;
  int64_t chunk_rows;  // rows whose hidden states are packed together
  int64_t block_rows;  // rows per task
  int64_t row_logits;  // [1 + K, kTile]
};

Plan make_plan(const MixtureStatsArgs& args, int64_t scored) {
  Plan p;
  p.blocks = divide(args.head, args.dropout);
  p.deep = p.blocks.inner.depth < p.blocks.inner.units;
  const int64_t vocabulary = args.head.weight.rows;
  p.columns = ceil_div(ceil_div(vocabulary, kTile), kMaxSplits) * kTile;
  p.splits = ceil_div(vocabulary, p.columns);
  const int64_t fitting = kPackedBytes / (4 * greater(1, p.blocks.inner.units)) / kPanelRows * kPanelRows;
  p.chunk_rows = lesser(ceil_div(scored, kPanelRows) * kPanelRows, greater(kPanelRows, fitting));
  const int64_t row_blocks = greater(1, ceil_div(4 * args.head.threads, p.splits));
  p.block_rows = ceil_div(ceil_div(p.chunk_rows, row_blocks), kPanelRows) * kPanelRows;
  p.row_logits = (1 + args.draws) * kTile;
  if (p.deep) {
    const int64_t waiting = kBufferBytes / (4 * p.row_logits) / kPanelRows * kPanelRows;
    p.block_rows = lesser(p.block_rows, greater(kPanelRows, waiting));
  }
  return p;
}

// Data of a chunk that the threads share.
struct Chunk {
  const int64_t* rows;      // row numbers
  int64_t count;
  float* hidden;            // [panels, units, kPanelRows]
  bool* keep;               // [rows, K, blocks]
  Mixture* mixtures;        // [splits, rows]
};

// Per-thread scratch.
struct Workspace {
  float* weights;  // [kTile / kPanelColumns, depth, kPanelColumns]
  float* partial;  // [depth / blocks.units, kPlane]
  float* logits;   // [1 or block_rows, 1 + K, kTile]
};

// The mixture of rows [begin, end) of the chunk over one split.
void mix_split(const MixtureStatsArgs& args, const Plan& plan, const Transform& transform, const Chunk& chunk,
               const Normaliser* norms /* [N, K] */, const Workspace& ws, int64_t begin, int64_t end, int64_t split) {
  const Matrix& weight = args.head.weight;
  const Blocks& blocks = plan.blocks;
  const Inner& inner = blocks.inner;
  Mixture* mixtures = chunk.mixtures + split * plan.chunk_rows;
  for (int64_t i = begin; i < end; ++i) mixtures[i] = {};
  const int64_t last = lesser((split + 1) * plan.columns, weight.rows);
  for (int64_t tile = split * plan.columns; tile < last; tile += kTile) {
    const int width = static_cast<int>(lesser(kTile, last - tile));
    const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
    for (int64_t k0 = 0; k0 < inner.units || k0 == 0; k0 += inner.depth) {
      const int64_t k = lesser(inner.depth, inner.units - k0);
      pack_weights(weight, inner, tile, width, k0, k, ws.weights);
      for (int64_t row = begin; row < end; row += kPanelRows) {
        multiply_blocks(blocks, chunk.hidden + row * inner.units + k0 * kPanelRows, ws.weights, width, k, ws.partial);
        for (int64_t i = row; i < lesser(row + kPanelRows, end); ++i) {
          float* z = ws.logits + (plan.deep ? (i - begin) * plan.row_logits : 0);
          const bool* keep = chunk.keep + i * args.draws * blocks.count + k0 / blocks.units;
          combine(ws.partial + (i - row) * kTile, ceil_div(k, blocks.units), keep, blocks.count, args.draws, width,
                  k0 > 0, z);
          if (k0 + inner.depth < inner.units) continue;
          for (int d = 1; d <= args.draws; ++d) transform(z + d * kTile, width, tile);
          mix(z + kTile, kTile, args.draws, n, norms + chunk.rows[i] * args.draws, mixtures[i]);
        }
      }
    }
  }
}

// The mixture of all scored rows, from the normalisers of their draws.
bool mix_rows(const MixtureStatsArgs& args, const int64_t* rows, int64_t scored, const Normaliser* norms /* [N, K] */) {
  const Plan plan = make_plan(args, scored);
  const Inner& inner = plan.blocks.inner;
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(kTile * inner.depth), arena.take<float>(inner.depth / plan.blocks.units * kPlane),
                     arena.take<float>((plan.deep ? plan.block_rows : 1) * plan.row_logits)};
  };
  Chunk chunk{};
  const auto carve_chunk = [&](Arena& arena) {
    chunk.hidden = arena.take<float>(plan.chunk_rows * inner.units);
    chunk.keep = arena.take<bool>(plan.chunk_rows * args.draws * plan.blocks.count);
    chunk.mixtures = arena.take<Mixture>(plan.splits * plan.chunk_rows);
  };
  Arena layout(nullptr), chunk_layout(nullptr);
  carve(layout);
  carve_chunk(chunk_layout);
  Scratch thread_scratch(args.head.threads * layout.used()), chunk_scratch(chunk_layout.used());
  if (thread_scratch.missing() || chunk_scratch.missing()) return false;
  Arena chunk_arena(chunk_scratch.as<char>());
  carve_chunk(chunk_arena);
  const Transform transform(args.head, args.dropout.inverse_keep);

  for (int64_t begin = 0; begin < scored; begin += plan.chunk_rows) {
    chunk.rows = rows + begin;
    chunk.count = lesser(plan.chunk_rows, scored - begin);
    const int64_t blocks = ceil_div(chunk.count, plan.block_rows);
#pragma omp parallel num_threads(args.head.threads)
    {
      const Tiles tiles;
      Arena arena(thread_scratch.as<char>() + thread_number() * layout.used());
      const Workspace ws = carve(arena);
#pragma omp for
      for (int64_t row = 0; row < chunk.count; row += kPanelRows) {
        const int count = static_cast<int>(lesser(kPanelRows, chunk.count - row));
        pack_rows(args.head.hidden, chunk.rows + row, count, inner.pairs, inner.units, chunk.hidden + row * inner.units);
        for (int64_t i = row; i < row + count; ++i) {
          keep_blocks(args.dropout, plan.blocks, chunk.rows[i], args.draws,
                      chunk.keep + i * args.draws * plan.blocks.count);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < blocks * plan.splits; ++task) {
        const int64_t first = task % blocks * plan.block_rows;
        mix_split(args, plan, transform, chunk, norms, ws, first, lesser(first + plan.block_rows, chunk.count),
                  task / blocks);
      }
#pragma omp for
      for (int64_t i = 0; i < chunk.count; ++i) {
        finish_mixture(chunk.mixtures + i, plan.splits, plan.chunk_rows, chunk.rows[i], args.rows, args.state);
      }
    }
  }
  return true;
}

}  // namespace

bool block_mixture(const MixtureStatsArgs& args) {
  const int64_t n = args.rows;
  Scratch row_scratch(8 * n), norm_scratch(n * args.draws * int64_t(sizeof(Normaliser)));
  Scratch state_scratch(args.row_state ? 0 : 8 * 8 * n);
  if (row_scratch.missing() || norm_scratch.missing() || state_scratch.missing()) return false;
  int64_t* rows = row_scratch.as<int64_t>();
  const int64_t scored = list_rows(args, rows);
  double* state = args.row_state ? args.row_state : state_scratch.as<double>();
  int64_t* index = args.row_state ? args.row_index : state_scratch.as<int64_t>() + 7 * n;
  const BlockDraws drawn = {args.dropout, args.draws, norm_scratch.as<float>(), args.state, args.votes};
  if (!row_stats({args.head, args.gram, drawn, state, index})) return false;
  return scored == 0 || mix_rows(args, rows, scored, norm_scratch.as<Normaliser>());
}

}  // namespace acqcore::ACQCORE_ISA
