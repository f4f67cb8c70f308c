// Row statistics fused with the head's product on Hopper (sm_90a): logits live in registers and are never written.
//
// Three kernels process a chunk of rows:
//
//   pack_rows      packs the hidden states of scored rows, without a host sync, and computes each target's logit
//   product_fold   computes the product and folds it tile by tile into one state per row and split
//   merge_splits   merges the splits of a row in float64, in a fixed order
//
// product_fold is persistent: a cluster of two blocks loops over units, each a pair of row blocks (2 x 128) and a split
// of the vocabulary, and walks the split's tiles of 256 columns. A block has one loader warp and two warpgroups that
// multiply and fold 64 x 256 logits each. Both blocks need the same weights: each loads half and multicasts it to both.
// Splits depend on the vocabulary alone, so a row's result does not depend on its batch.
//
// Synchronization. A stage of the ring holds 64 columns of depth: 128 rows of hidden states, 256 of weights. `full`
// expects one arrival from the block's own loader and the bytes loaded by both blocks. `empty` expects an arrival from
// every consumer warp of both blocks, since copies write to both. Step j reuses the stage of step j - kStages. A warp
// frees step j once its products of step j + 1 are queued, and frees the last step of a tile before it folds. No
// deadlock: when the slowest consumer is at step j of its unit, all others have begun j and so have freed all steps up
// to j - 2; the stages of j and j + 1 can be loaded and it proceeds. At the first step of a tile all have freed j - 1,
// so the whole ring can be loaded and the first warpgroup can reach the lead that the second waits for.
//
// Overlap. The two warpgroups share the tensor cores: 1024 cycles per step. The second starts `lag` steps behind in
// every tile, so one folds (about 1500 cycles) while the other multiplies alone, at 512 cycles per step.
//
// At N = 4096, D = 4096, V = 131072, 16 pairs x 66 splits over 66 clusters give 16 units each, of 7 or 8 tiles: 124 or
// 125 tiles of 65536 cycles, 1 % above an even share. L2 delivers 32 KiB per block and step, 32 bytes per cycle. Eight
// pairs walk the vocabulary together: 17 MB of hidden states stay in L2 and the weights are read twice, 0.35 TB/s.
//
// For the Gram matrix of a block's 128 rows, their exponentials go through shared memory in bfloat16: the first
// warpgroup multiplies its rows by themselves, the second multiplies its rows by all. Symmetry gives the rest, and the
// first warpgroup, which leads, never waits for the second's terms of the same tile. The matrix stays in L2 between
// tiles. Targets of a row's sample are left out. The terms occupy the space of a stage. merge_grams sums the splits.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "hopper.cuh"
#include "launch.h"
#include "tile_fold.cuh"

namespace acqcore::cuda {
namespace {

constexpr int kRows = 128;   // per block
constexpr int kDepth = 64;   // per stage: 128 bytes, the width of the swizzle
constexpr int kBlocks = 2;   // per cluster
constexpr int kPairRows = kBlocks * kRows;
constexpr int kBoxBytes = kRows * kDepth * 2;  // all boxes are 128 rows of 64 columns
constexpr int kStageBytes = 3 * kBoxBytes;     // hidden states, two halves of the weights
constexpr int kGramFloats = (64 + kGramRows) * 64;  // per block: rows 0-63 by 64 columns, rows 64-127 by all 128
constexpr int kWarpgroup = 4 * kWarp;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kConsumerWarps = 8;
constexpr int kProductDepth = 16;
// Named barriers. Terms: the first warpgroup has written its terms to shared memory. Read: the second has read them.
constexpr int kLagBarrier = 1, kTermsBarrier = 2, kReadBarrier = 3, kOwnBarrier = 4;  // the second's own is 5
constexpr int64_t kScratchBytes = 56 << 20;

// A slot's target as a column of this weight (negative for none) and its sample's first and last slot in the block.
struct alignas(8) Mark {
  int column;
  int16_t first, last;
};

struct ProductArgs {
  const int* count;  // [1] packed rows, or null for all `rows`
  int rows;
  int depth_steps;
  int tiles;  // of the vocabulary
  int splits;
  int group;
  int lag;
  Logits logits;
  RowPartial* partials;  // [splits, rows], written
  const Mark* marks;     // [rows] or null: no Gram matrices
  float* grams;          // [rows / 128, splits, kGramFloats], written
};

// A cluster's unit of work.
struct Unit {
  int first_row;  // of the pair
  int split, first_tile, last_tile;
};

// Pairs of row blocks vary fastest, in groups of `group` pairs, so that concurrent clusters share weights in L2.
__device__ Unit unit_at(const ProductArgs& args, int pairs, int unit) {
  const int before = unit / (args.group * args.splits) * args.group;
  const int width = min(pairs - before, args.group);
  const int within = unit - before * args.splits;
  const int split = within / width;
  return {(before + within % width) * kPairRows, split, split_begin(split, args.splits, args.tiles),
          split_begin(split + 1, args.splits, args.tiles)};
}

// Shared memory: a ring of stages; a tile's terms and the rows' rescaling factors, for the Gram matrix; barriers.
template <bool grams>
struct Ring {
  static constexpr int kStages = grams ? 3 : 4;
  static constexpr int kTerms = kStages * kStageBytes, kFactors = kTerms + (grams ? kGramTileBytes : 0);
  static constexpr int kBarriers = kFactors + (grams ? kRows * 4 : 0);
  static constexpr int kBytes = kBarriers + 2 * kStages * 8;
  uint32_t stages;  // address, a multiple of 1024 as the swizzle requires
  __device__ uint32_t hidden(int stage) const { return stages + stage * kStageBytes; }
  __device__ uint32_t weight(int stage) const { return stages + stage * kStageBytes + kBoxBytes; }
  __device__ uint32_t full_at(int stage) const { return stages + kBarriers + 8 * stage; }
  __device__ uint32_t empty_at(int stage) const { return stages + kBarriers + 8 * (kStages + stage); }
  __device__ uint32_t terms() const { return stages + kTerms; }
};

constexpr int kAlignment = 1024;

// A position in the ring.
template <int stages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// One thread fills the ring.
template <bool grams>
__device__ void load_units(const CUtensorMap& hidden, const CUtensorMap& weight, const ProductArgs& args,
                           const Ring<grams>& ring, int pairs, int rank) {
  Place<Ring<grams>::kStages> at;
  for (int u = blockIdx.x / kBlocks; u < pairs * args.splits; u += gridDim.x / kBlocks) {
    const Unit unit = unit_at(args, pairs, u);
    const int row = unit.first_row + rank * kRows;
    for (int tile = unit.first_tile; tile < unit.last_tile; ++tile) {
      for (int k = 0; k < args.depth_steps; ++k, at.advance()) {
        const uint32_t full = ring.full_at(at.stage);
        hopper::barrier_wait(ring.empty_at(at.stage), at.parity ^ 1);
        hopper::barrier_expect(full, kStageBytes);
        hopper::load_box(hidden, ring.hidden(at.stage), full, k * kDepth, row);
        hopper::load_box(weight, ring.weight(at.stage) + rank * kBoxBytes, full, k * kDepth,
                         tile * kTileColumns + rank * kRows, (1 << kBlocks) - 1);
      }
    }
  }
}

// In a warp's rows of a tile's terms, zeroes the columns that are targets of the row's own sample.
__device__ void leave_out_targets(const Mark* marks /* [128] */, int begin, int first_row, char* terms) {
  const int lane = threadIdx.x % kWarp, row = first_row + lane % 16;
  for (int i = 0; i < kGramRows; i += kWarp) {
    const Mark mark = marks[i + lane];
    const int span = mark.first | mark.last << 16;
    for (uint32_t here = __ballot_sync(~0u, unsigned(mark.column - begin) < kTileColumns); here; here &= here - 1) {
      const int source = __ffs(here) - 1;
      const int column = __shfl_sync(~0u, mark.column, source) - begin, of = __shfl_sync(~0u, span, source);
      if (lane < 16 && row >= (of & 0xffff) && row <= of >> 16) {
        *reinterpret_cast<uint16_t*>(terms + place_of(row, column)) = 0;
      }
    }
  }
}

// gram = factors gram factors + terms terms^T for a warpgroup's 64 rows and the block's first `columns` rows. In every
// tile the same thread reads and writes an element.
template <int columns>
__device__ void add_products(float* gram /* [64, columns] */, bool begun, uint32_t terms, int own_rows,
                             const float (&row_factor)[2], const float* factors /* [columns] */) {
  constexpr int kProducts = 64 / kProductDepth, step = kProductDepth * 2 / 16;
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
  float d[columns / 2];
  const uint64_t a = hopper::matrix_descriptor(terms + own_rows * 128), b = hopper::matrix_descriptor(terms);
  hopper::product_fence();
#pragma unroll
  for (int i = 0; i < kTileColumns / kProductDepth; ++i) {
    const int at = i / kProducts * (kGramChunk / 16) + i % kProducts * step;
    hopper::product(d, a + at, b + at, i > 0);
  }
  hopper::product_commit();
  float2* own = reinterpret_cast<float2*>(gram + (16 * warp + lane / kSharing) * columns + lane % kSharing * 2);
  float2 before[2][columns / 8];
#pragma unroll
  for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      before[half][j] = begun ? own[(8 * half * columns + 8 * j) / 2] : make_float2(0, 0);
    }
  }
  hopper::product_wait<0>();
  hopper::pin(d);
#pragma unroll
  for (int j = 0; j < columns / 8; ++j) {
    const float2 factor = *reinterpret_cast<const float2*>(factors + 8 * j + lane % kSharing * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      own[(8 * half * columns + 8 * j) / 2] =
          make_float2(fmaf(before[half][j].x, row_factor[half] * factor.x, d[4 * j + 2 * half]),
                      fmaf(before[half][j].y, row_factor[half] * factor.y, d[4 * j + 2 * half + 1]));
    }
  }
}

// Multiplies and folds a warpgroup's 64 rows of the block.
template <DType dtype, Transform transform, bool grams>
__device__ void fold_units(const ProductArgs& args, const Ring<grams>& ring, char* shared, int pairs, int rank,
                           int warpgroup) {
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
  const int own_rows = warpgroup * (kRows / 2), warp_rows = own_rows + 16 * warp;
  float z[kHeld][kLaneLogits];
  Place<Ring<grams>::kStages> at;
  if (grams && warpgroup == 1) hopper::named_arrive(kReadBarrier, 2 * kWarpgroup);
  const auto release = [&](int stage) {
    if (lane < kBlocks) hopper::barrier_arrive(ring.empty_at(stage), lane);
  };
  for (int u = blockIdx.x / kBlocks; u < pairs * args.splits; u += gridDim.x / kBlocks) {
    const Unit unit = unit_at(args, pairs, u);
    const int block_row = unit.first_row + rank * kRows;
    RowLane rows[kHeld][2] = {{empty_row(), empty_row()}};
    for (int tile = unit.first_tile; tile < unit.last_tile; ++tile) {
      if (args.lag && warpgroup == 1) hopper::named_sync(kLagBarrier, 2 * kWarpgroup);
      int previous = 0;
      for (int k = 0; k < args.depth_steps; ++k, at.advance()) {
        hopper::barrier_wait(ring.full_at(at.stage), at.parity);
        const uint64_t a = hopper::matrix_descriptor(ring.hidden(at.stage) + own_rows * kDepth * 2);
        const uint64_t b = hopper::matrix_descriptor(ring.weight(at.stage));
        hopper::product_fence();
#pragma unroll
        for (int i = 0; i < kDepth / kProductDepth; ++i) {
          constexpr int step = kProductDepth * 2 / 16;
          hopper::product<dtype>(z[0], a + i * step, b + i * step, k + i > 0);
        }
        hopper::product_commit();
        if (k > 0) {
          hopper::product_wait<1>();
          release(previous);
        }
        previous = at.stage;
        if (k + 1 == args.lag && warpgroup == 0) hopper::named_arrive(kLagBarrier, 2 * kWarpgroup);
      }
      hopper::product_wait<0>();
      hopper::pin(z[0]);
      release(previous);
      finish_logits<transform>(z, tile * kTileColumns, args.logits);
      Raised raised[kHeld][2];
      fold_tile<grams>(z, tile * kTileColumns, rows, raised);
      if constexpr (grams) {
        int first_row = warp_rows, row_of_block = block_row;
        asm volatile("" : "+r"(first_row), "+r"(row_of_block));  // addresses take no registers during the product
        char* terms = shared + Ring<grams>::kTerms;
        auto* factors = reinterpret_cast<float*>(shared + Ring<grams>::kFactors);
        const float factor[2] = {raised[0][0].factor, raised[0][1].factor};
        if (warpgroup == 1) {
          hopper::named_sync(kOwnBarrier + 1, kWarpgroup);  // its warps are done with the previous tile's terms
        } else {
          hopper::named_sync(kReadBarrier, 2 * kWarpgroup);  // both warpgroups are done with them
        }
        store_terms(z, raised, first_row, terms);
        if (lane % kSharing == 0) {
          factors[first_row + lane / kSharing] = factor[0];
          factors[first_row + lane / kSharing + 8] = factor[1];
        }
        leave_out_targets(args.marks + row_of_block, tile * kTileColumns, first_row, terms);
        hopper::fence_for_products();
        float* gram = args.grams + (int64_t(row_of_block / kRows) * args.splits + unit.split) * kGramFloats;
        const bool begun = tile > unit.first_tile;
        if (warpgroup == 0) {
          hopper::named_arrive(kTermsBarrier, 2 * kWarpgroup);
          hopper::named_sync(kOwnBarrier, kWarpgroup);
          add_products<64>(gram, begun, ring.terms(), 0, factor, factors);
        } else {
          hopper::named_sync(kTermsBarrier, 2 * kWarpgroup);
          add_products<kGramRows>(gram + 64 * 64, begun, ring.terms(), own_rows, factor, factors);
          hopper::named_arrive(kReadBarrier, 2 * kWarpgroup);
        }
      }
    }
    combine_lanes(rows);
    const int row = block_row + warp_rows + lane / kSharing;
    if (lane % kSharing == 0) {
      RowPartial* partials = args.partials + int64_t(unit.split) * args.rows + row;
      if (row < args.rows) partials[0] = partial_of(rows[0][0]);
      if (row + 8 < args.rows) partials[8] = partial_of(rows[0][1]);
    }
  }
  if (grams && warpgroup == 0) hopper::named_sync(kReadBarrier, 2 * kWarpgroup);
}

template <DType dtype, Transform transform, bool grams>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    product_fold(const __grid_constant__ CUtensorMap hidden /* [rows, depth] */,
                 const __grid_constant__ CUtensorMap weight /* [vocab, depth] */,
                 const __grid_constant__ ProductArgs args) {
  extern __shared__ char unaligned[];
  const uint32_t skipped = -hopper::shared_address(unaligned) % kAlignment;
  const Ring<grams> ring = {hopper::shared_address(unaligned) + skipped};
  const int rank = hopper::cluster_rank();
  const int pairs = ((args.count ? *args.count : args.rows) + kPairRows - 1) / kPairRows;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < ring.kStages; ++stage) {
      hopper::barrier_init(ring.full_at(stage), 1);
      hopper::barrier_init(ring.empty_at(stage), kBlocks * kConsumerWarps);
    }
    hopper::barrier_init_visible_to_cluster();
    hopper::prefetch(hidden);
    hopper::prefetch(weight);
  }
  hopper::cluster_sync();
  if (threadIdx.x < kWarpgroup) {
    hopper::lower_registers<40>();
    if (threadIdx.x == 0) load_units(hidden, weight, args, ring, pairs, rank);
  } else {
    hopper::raise_registers<232>();
    fold_units<dtype, transform>(args, ring, unaligned + skipped, pairs, rank, threadIdx.x / kWarpgroup - 1);
  }
  __syncwarp();
  hopper::cluster_sync();  // the other block may still write to this one's memory and barriers
}

constexpr int kPackRows = 8;  // per block, one per warp

struct PackArgs {
  Matrix hidden, weight;   // hidden: the chunk's rows, or all with slots
  int rows;                // in the chunk
  const Slot* slots;       // [rows], each slot's row of `hidden`, or null: scored rows are compacted
  const int64_t* targets;  // of hidden's rows, or null
  int64_t vocab_start;
  Logits logits;
  bool capped, vectors;  // vectors: load hidden states 16 bytes at a time
  uint16_t* packed;      // [rows, pitch], written: the scored rows in order
  int pitch;
  int* position;         // [rows], written: a row's place in `packed`, -1 if ignored
  float* target_logit;   // [rows], written: -inf where the target is outside this vocabulary
  int* count;            // [1], number of scored rows, written without slots
  Mark* marks;           // [rows], written with slots
};

// Loads eight elements from column `begin` on; zero beyond the last column.
template <DType dtype>
__device__ void load_eight(const uint16_t* row, int64_t stride, int begin, int columns, bool vectors,
                           uint32_t (&words)[4]) {
  if (vectors && begin + 8 <= columns) {
    const uint4 v = *reinterpret_cast<const uint4*>(row + begin);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    return;
  }
  for (int i = 0; i < 4; ++i) {
    const int c = begin + 2 * i;
    const uint32_t low = c < columns ? row[c * stride] : 0, high = c + 1 < columns ? row[(c + 1) * stride] : 0;
    words[i] = low | high << 16;
  }
}

template <DType dtype>
__global__ void __launch_bounds__(kPackRows* kWarp) pack_rows(const __grid_constant__ PackArgs args) {
  const int first = blockIdx.x * kPackRows, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = first + warp, rows = args.rows;
  const auto source_of = [&](int i) { return i >= rows ? -1 : args.slots ? args.slots[i].row : i; };
  const auto scored = [&](int i) { return source_of(i) >= 0 && (!args.targets || args.targets[source_of(i)] != -100); };
  int place = row;
  if (args.targets && !args.slots) {  // every block counts the rows before its own
    __shared__ int before;
    if (threadIdx.x == 0) before = 0;
    __syncthreads();
    int mine = 0;
    for (int i = threadIdx.x; i < first; i += blockDim.x) mine += scored(i);
    mine = __reduce_add_sync(~0u, mine);
    if (lane == 0 && mine) atomicAdd(&before, mine);
    __syncthreads();
    place = before;
    for (int i = first; i < row; ++i) place += scored(i);
  }
  const bool here = scored(row);
  if (lane == 0 && row == rows - 1 && !args.slots) *args.count = place + here;
  if (row >= rows) return;
  if (lane == 0) args.position[row] = here ? place : -1;
  const int source_row = source_of(row);
  const int64_t target = here && args.targets ? args.targets[source_row] - args.vocab_start : -1;
  const bool owned = target >= 0 && target < args.weight.rows;
  if (args.slots && lane == 0) {
    args.marks[row] = {owned ? static_cast<int>(target) : -1, args.slots[row].first, args.slots[row].last};
  }
  if (!here) {
    if (!args.slots) return;
    for (int c = 8 * lane; c < args.pitch; c += 8 * kWarp) {
      *reinterpret_cast<uint4*>(args.packed + int64_t(place) * args.pitch + c) = make_uint4(0, 0, 0, 0);
    }
    return;
  }
  const auto* source = static_cast<const uint16_t*>(args.hidden.data) + source_row * args.hidden.row_stride;
  const auto* weight = static_cast<const uint16_t*>(args.weight.data) + (owned ? target : 0) * args.weight.row_stride;
  const int depth = static_cast<int>(args.hidden.columns);
  float product = 0;
  for (int c = 8 * lane; c < args.pitch; c += 8 * kWarp) {
    uint32_t h[4], w[4];
    load_eight<dtype>(source, args.hidden.column_stride, c, depth, args.vectors, h);
    *reinterpret_cast<uint4*>(args.packed + int64_t(place) * args.pitch + c) = make_uint4(h[0], h[1], h[2], h[3]);
    if (!owned) continue;
    load_eight<dtype>(weight, 1, c, depth, true, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      product = fmaf(Words<dtype>::get(h[i / 2], i % 2), Words<dtype>::get(w[i / 2], i % 2), product);
    }
  }
  float sum[1] = {product};
  butterfly(sum, [](float a, float b) { return a + b; });
  if (lane != 0) return;
  const float biased = owned && args.logits.bias ? sum[0] + args.logits.bias[target] : sum[0];
  const float logit = args.capped ? logit_of<Transform::kCapped>(biased, args.logits)
                                  : logit_of<Transform::kAffine>(biased, args.logits);
  args.target_logit[row] = owned ? logit : -INFINITY;
}

constexpr int kMergeThreads = 128;

struct MergeArgs {
  const RowPartial* partials;  // [splits, rows]
  int splits, rows;
  const int* position;        // [rows], index of a row's partials, or null: the row's own
  const Slot* slots;          // [rows], where a row's state goes, or null: to its own index
  const int64_t* targets;     // [all_rows] or null
  const float* target_logit;  // [rows], with targets
  int64_t vocab_start, all_rows;
  double* state;   // [7, all_rows], `rows` of them written
  int64_t* index;  // [all_rows], `rows` of them written
};

__device__ RowState shuffle_down(const RowState& s, int lanes) {
  const auto down = [&](auto v) { return __shfl_down_sync(~0u, v, lanes, kMergeLanes); };
  return {down(s.max), down(s.second), down(s.target),
          {down(s.sums.r), down(s.sums.s1), down(s.sums.s2), down(s.sums.s11)}, down(s.index)};
}

__global__ void __launch_bounds__(kMergeThreads) merge_splits(const __grid_constant__ MergeArgs args) {
  const int row = (blockIdx.x * kMergeThreads + threadIdx.x) / kMergeLanes, lane = threadIdx.x % kMergeLanes;
  const int at = row >= args.rows ? -1 : args.position ? args.position[row] : row;
  RowState s = merged_stretch(args.partials + max(at, 0), args.rows, lane, args.splits);
  for (int lanes = 1; lanes < kMergeLanes; lanes *= 2) {
    const RowState later = shuffle_down(s, lanes);
    if (lane % (2 * lanes) == 0) merge(s, later);
  }
  if (lane != 0 || row >= args.rows) return;
  const int out = args.slots ? args.slots[row].row : row;
  if (out < 0) return;
  if (s.index >= 0) s.index += args.vocab_start;
  if (args.targets && at >= 0) {
    // Use the maximum itself, not the logit that was summed in another order: a confident row's logprob is -log1p(R).
    s.target = args.targets[out] == s.index ? s.max : double(args.target_logit[row]);
  }
  const double values[7] = {s.max, s.second, s.sums.r, s.sums.s1, s.sums.s2, s.sums.s11, s.target};
  for (int i = 0; i < 7; ++i) args.state[i * args.all_rows + out] = at >= 0 ? values[i] : NAN;
  args.index[out] = at >= 0 ? s.index : -1;
}

struct MergeGramsArgs {
  const float* grams;          // [rows / 128, splits, kGramFloats]
  const RowPartial* partials;  // [splits, rows]
  int splits, rows;
  const Slot* slots;    // [rows]
  const int* position;  // [rows]
  const double* max;    // [all rows], from the row states
  float* products;      // written
};

// One warp per row of the matrices: rebases all splits to the final maxima and adds them in order. A slot is combined
// only with the slots before it in its sample, so that a sample's result does not depend on its place.
__global__ void __launch_bounds__(kMergeThreads) merge_grams(const __grid_constant__ MergeGramsArgs args) {
  const int slot = (blockIdx.x * kMergeThreads + threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  if (slot >= args.rows) return;
  const Slot own = args.slots[slot];
  if (own.row < 0 || own.start < 0) return;
  const int s = slot % kGramRows, block = slot / kGramRows * kGramRows, length = own.last - own.first + 1;
  const bool scored = args.position[slot] >= 0;
  const float top_s = static_cast<float>(args.max[own.row]);
  const float* row = args.grams + int64_t(slot / kGramRows) * args.splits * kGramFloats +
                     (s < 64 ? s * 64 : 64 * 64 + (s - 64) * kGramRows);
  const auto factor = [](float top, float final) { return top == -INFINITY ? 0.0f : expf(top - final); };
  for (int t = own.first + lane; t <= s; t += kWarp) {
    float total = 0;
    if (scored && args.position[block + t] >= 0) {
      const float top_t = static_cast<float>(args.max[args.slots[block + t].row]);
#pragma unroll 4
      for (int split = 0; split < args.splits; ++split) {
        const RowPartial* tops = args.partials + int64_t(split) * args.rows;
        const float c = factor(tops[slot].top, top_s) * factor(tops[block + t].top, top_t);
        total = fmaf(row[int64_t(split) * kGramFloats + t], c, total);
      }
      total *= static_cast<float>(kUnscale * kUnscale);
    }
    float* products = args.products + own.start;
    products[(s - own.first) * length + t - own.first] = total;
    products[(t - own.first) * length + s - own.first] = total;
  }
}

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("cuda row_stats: ") + call + ": " + cudaGetErrorString(error));
}

template <typename T>
T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Whether the copy engine and 16-byte loads can address the rows of `m`.
bool addressable(const Matrix& m) {
  return m.column_stride == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.row_stride * 2 % 16 == 0 &&
         m.row_stride >= m.columns && m.row_stride * 2 < int64_t(1) << 40;
}

bool packs(const RowStatsArgs& args) { return args.targets || !addressable(args.hidden); }

// The number of splits is a multiple of half the clusters of an H100, so that with an even number of pairs all clusters
// get equally many units. On an H100, N = 4096: 66 splits of 7.8 tiles took 6.2 ms, 33 6.4 and 132 6.7 (V = 131072,
// D = 4096); 33 splits of 5.8 tiles took 0.46 ms, 66 0.55 and 132 0.57 (V = 49152, D = 576).
int splits_of(const ProductPlan& plan, int64_t vocab) {
  constexpr int64_t kStep = 33, kTilesOfSplit = 7;
  const int64_t tiles = ceil_div<int64_t>(vocab, kTileColumns);
  const int64_t splits = plan.splits ? plan.splits : kStep * std::max<int64_t>(tiles / (kStep * kTilesOfSplit), 1);
  return static_cast<int>(std::min(splits, tiles));
}

// Layout of a chunk's scratch memory; offsets are multiples of 256 bytes.
struct Layout {
  int64_t all_rows, rows;  // per call and per chunk: slots with Gram matrices, else rows of the hidden states
  int splits, pitch;
  int64_t partials, position, target_logit, count, marks, grams, bytes;
};

Layout layout_of(const RowStatsArgs& args, const ProductPlan& plan) {
  const bool with_grams = args.gram.slots;
  Layout layout;
  layout.all_rows = with_grams ? args.gram.count : args.hidden.rows;
  layout.splits = splits_of(plan, args.weight.rows);
  layout.pitch = static_cast<int>(ceil_div<int64_t>(args.hidden.columns, 8) * 8);
  const int64_t gram_bytes = with_grams ? layout.splits * kGramFloats * 4 / kGramRows : 0;  // per row
  const int64_t mark_bytes = with_grams ? sizeof(Mark) : 0;
  const int64_t row_bytes = layout.splits * int64_t(sizeof(RowPartial)) + (packs(args) ? 2 * layout.pitch + 8 : 0) +
                            gram_bytes + mark_bytes;
  const int64_t pairs = ceil_div<int64_t>(layout.all_rows, kPairRows);
  const int64_t most = std::max<int64_t>(kScratchBytes / row_bytes / kPairRows, 1);
  const int64_t chunks = std::max<int64_t>(ceil_div(pairs, most), 1);  // of nearly equal length
  layout.rows = std::min(layout.all_rows, ceil_div(pairs, chunks) * kPairRows);
  int64_t end = packs(args) ? layout.rows * layout.pitch * 2 : 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = end = ceil_div<int64_t>(end, 256) * 256;
    end += bytes;
    return begin;
  };
  layout.partials = take(layout.rows * layout.splits * int64_t(sizeof(RowPartial)));
  layout.position = take(layout.rows * 4);
  layout.target_logit = take(layout.rows * 4);
  layout.count = take(4);
  layout.marks = take(layout.rows * mark_bytes);
  layout.grams = take(layout.rows * gram_bytes);
  layout.bytes = end;
  return layout;
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Looks the function up in the driver that the runtime loaded, so that nothing here links against the driver.
EncodeTiled encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        "cudaGetDriverEntryPointByVersion");
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("cuda row_stats: the driver has no cuTensorMapEncodeTiled; it is older than CUDA 12");
  }
  return reinterpret_cast<EncodeTiled>(function);
}

CUtensorMap tensor_map(const void* data, int64_t rows, int64_t columns, int64_t row_stride, DType dtype) {
  static const EncodeTiled encode = encode_tiled();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(row_stride) * 2};
  const cuuint32_t box[2] = {kDepth, kRows}, steps[2] = {1, 1};
  const CUresult result =
      encode(&map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuda row_stats: cuTensorMapEncodeTiled: error " + std::to_string(int(result)));
  }
  return map;
}

template <DType dtype, Transform transform, bool grams>
void launch_product(const CUtensorMap& hidden, const CUtensorMap& weight, ProductArgs args, const Launch& launch) {
  const auto kernel = product_fold<dtype, transform, grams>;
  constexpr int stages = Ring<grams>::kStages, shared = Ring<grams>::kBytes + kAlignment;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "cudaFuncSetAttribute");
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, launch.device),
        "cudaDeviceGetAttribute");
  // One stage stays free for loads, and the lead is shorter than a tile.
  args.lag = args.depth_steps > stages ? std::min(args.lag, stages - 1) : 0;
  const int units = ceil_div(args.rows, kPairRows) * args.splits;
  const int clusters = std::max(std::min(units, multiprocessors / kBlocks), 1);
  kernel<<<clusters * kBlocks, kThreads, shared, static_cast<cudaStream_t>(launch.stream)>>>(hidden, weight, args);
  check(cudaGetLastError(), "launch of product_fold");
}

template <DType dtype>
void launch_product(const CUtensorMap& hidden, const CUtensorMap& weight, const ProductArgs& args, bool capped,
                    const Launch& launch) {
  const bool affine = changes(args.logits);
  if (args.marks && affine) return launch_product<dtype, Transform::kAffine, true>(hidden, weight, args, launch);
  if (args.marks) return launch_product<dtype, Transform::kNone, true>(hidden, weight, args, launch);
  if (capped) return launch_product<dtype, Transform::kCapped, false>(hidden, weight, args, launch);
  if (affine) return launch_product<dtype, Transform::kAffine, false>(hidden, weight, args, launch);
  launch_product<dtype, Transform::kNone, false>(hidden, weight, args, launch);
}

template <DType dtype>
void launch_chunks(const RowStatsArgs& args, const Launch& launch, const ProductPlan& plan, const Layout& layout) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  auto* scratch = static_cast<char*>(launch.scratch);
  const Matrix &h = args.hidden, &w = args.weight;
  const bool capped = args.softcap != 0, pack = packs(args), with_grams = args.gram.slots;
  const Logits logits = logits_of(args, static_cast<int>(w.rows));
  const CUtensorMap weight = tensor_map(w.data, w.rows, w.columns, w.row_stride, dtype);
  auto* partials = reinterpret_cast<RowPartial*>(scratch + layout.partials);
  auto* position = reinterpret_cast<int*>(scratch + layout.position);
  auto* target_logit = reinterpret_cast<float*>(scratch + layout.target_logit);
  auto* count = reinterpret_cast<int*>(scratch + layout.count);
  auto* marks = with_grams ? reinterpret_cast<Mark*>(scratch + layout.marks) : nullptr;
  auto* grams = with_grams ? reinterpret_cast<float*>(scratch + layout.grams) : nullptr;
  for (int64_t first = 0; first < layout.all_rows; first += layout.rows) {
    const int rows = static_cast<int>(std::min(layout.rows, layout.all_rows - first));
    const int64_t skipped = with_grams ? 0 : first;  // slots name their rows
    const Slot* slots = with_grams ? args.gram.slots + first : nullptr;
    Matrix part = h;
    part.data = static_cast<const uint16_t*>(h.data) + skipped * h.row_stride;
    const int64_t* targets = args.targets ? args.targets + skipped : nullptr;
    if (pack) {
      const PackArgs arguments = {part,         w,        rows,  slots,  targets, args.vocab_start,
                                  logits,       capped,   addressable(part),    reinterpret_cast<uint16_t*>(scratch),
                                  layout.pitch, position, target_logit,         count,
                                  marks};
      pack_rows<dtype><<<ceil_div(rows, kPackRows), kPackRows * kWarp, 0, stream>>>(arguments);
      check(cudaGetLastError(), "launch of pack_rows");
    }
    const CUtensorMap hidden = pack ? tensor_map(scratch, rows, h.columns, layout.pitch, dtype)
                                    : tensor_map(part.data, rows, h.columns, h.row_stride, dtype);
    const ProductArgs arguments = {pack && !with_grams ? count : nullptr,
                                   rows,
                                   static_cast<int>(ceil_div<int64_t>(h.columns, kDepth)),
                                   static_cast<int>(ceil_div<int64_t>(w.rows, kTileColumns)),
                                   layout.splits,
                                   plan.group,
                                   plan.lag,
                                   logits,
                                   partials,
                                   marks,
                                   grams};
    launch_product<dtype>(hidden, weight, arguments, capped, launch);
    const MergeArgs merging = {partials,         layout.splits, rows,    pack ? position : nullptr, slots,
                               targets,          target_logit,  args.vocab_start, h.rows,
                               args.state + skipped, args.index + skipped};
    merge_splits<<<ceil_div(rows * kMergeLanes, kMergeThreads), kMergeThreads, 0, stream>>>(merging);
    check(cudaGetLastError(), "launch of merge_splits");
    if (!with_grams) continue;
    const MergeGramsArgs summing = {grams, partials, layout.splits, rows, slots, position, args.state,
                                    args.gram.products};
    merge_grams<<<ceil_div(rows * kWarp, kMergeThreads), kMergeThreads, 0, stream>>>(summing);
    check(cudaGetLastError(), "launch of merge_grams");
  }
}

}  // namespace

int64_t row_stats_sm90_scratch(const RowStatsArgs& args, const ProductPlan& plan) {
  return layout_of(args, plan).bytes;
}

void row_stats_sm90(const RowStatsArgs& args, const Launch& launch, const ProductPlan& plan) {
  check(cudaSetDevice(launch.device), "cudaSetDevice");
  if (args.hidden.rows == 0) return;
  const Layout layout = layout_of(args, plan);
  if (launch.scratch_bytes < layout.bytes) {
    throw std::invalid_argument("scratch: expected at least " + std::to_string(layout.bytes) + " bytes, got " +
                                std::to_string(launch.scratch_bytes));
  }
  if (args.hidden.dtype == DType::kBFloat16) return launch_chunks<DType::kBFloat16>(args, launch, plan, layout);
  return launch_chunks<DType::kFloat16>(args, launch, plan, layout);
}

}  // namespace acqcore::cuda
