// Row statistics fused with the head's product on Hopper (sm_90a): logits live in registers and are never written.
//
// Three kernels for a chunk of rows:
//
//   pack_rows      packs the hidden states of scored rows, on the device alone, and takes each target's logit
//   product_fold   the product, folded tile by tile into row states: one state for each row and split
//   merge_splits   merges the splits of a row in float64, in one fixed order
//
// product_fold is persistent: a cluster of two blocks takes units, each a pair of row blocks (2 x 128) and a split of
// the vocabulary, and walks over the split's tiles of 256 columns. A block has a warp that loads and two warpgroups
// that multiply and fold 64 x 256 logits each. Both blocks need the same weights: each loads half and the copy engine
// writes it to both. Splits follow from the vocabulary alone, so a row's result does not depend on its batch.
//
// Who waits for whom. A stage of the ring holds 64 columns of depth: 128 rows of hidden states, 256 of weights.
// `full`: one arrival, of the block's own loader, and all bytes, its own and the other block's. `empty`: an arrival of
// each consumer warp of both blocks, for the copy writes to both. Step j waits for the stage of step j - kStages. A warp
// frees step j once its products of step j + 1 are queued, and the last step of a tile before it folds. Take the
// consumer that is furthest behind, at step j of its unit: all others have begun j, so they have freed j - 2 and what
// is before, the stages of j to j + 2 can be loaded, and it goes on. At the first step of a tile all have freed j - 1,
// so that four steps can be loaded and the first warpgroup can reach the lead that the second waits for.
//
// Why it does not stall. The two warpgroups share the tensor cores: 1024 cycles a step. The second starts `lag` steps
// behind in every tile, so one folds (about 1500 cycles) while the other multiplies alone, at 512 cycles a step.
//
// At N = 4096, D = 4096, V = 131072: 16 pairs x 66 splits over 66 clusters are 16 units each, of 7 or 8 tiles: 124 or
// 125 tiles of 65536 cycles, 1 % above an even share. L2 delivers 32 KiB a block and step, 32 bytes a cycle; memory
// is read for 8 pairs side by side: 17 MB of hidden states stay in L2, the weights pass twice, 0.35 TB/s.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "hopper.cuh"
#include "launch.h"
#include "tile_fold.cuh"

namespace acqcore::cuda {
namespace {

constexpr int kRows = 128;   // of a block
constexpr int kDepth = 64;   // of a stage: 128 bytes, the width of the swizzle
constexpr int kStages = 4;
constexpr int kBlocks = 2;   // of a cluster
constexpr int kPairRows = kBlocks * kRows;
constexpr int kBoxBytes = kRows * kDepth * 2;  // all boxes are 128 rows of 64 columns
constexpr int kStageBytes = 3 * kBoxBytes;     // hidden states, two halves of the weights
constexpr int kSharedBytes = kStages * kStageBytes + 1024 + 2 * kStages * 8;
constexpr int kWarpgroup = 4 * kWarp;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kConsumerWarps = 8;
constexpr int kProductDepth = 16;
constexpr int kLagBarrier = 1;
constexpr int64_t kScratchBytes = 56 << 20;

struct ProductArgs {
  const int* count;  // [1] rows that hold something, or null: `rows`
  int rows;
  int depth_steps;
  int tiles;  // of the vocabulary
  int splits;
  int group;
  int lag;
  bool multicast;
  Logits logits;
  RowPartial* partials;  // [splits, rows], written
};

// What a cluster works on at a time.
struct Unit {
  int first_row;  // of the pair
  int split, first_tile, last_tile;
};

// Pairs of row blocks pass fastest, within groups of `group` pairs: clusters side by side share weights in L2.
__device__ Unit unit_at(const ProductArgs& args, int pairs, int unit) {
  const int before = unit / (args.group * args.splits) * args.group;
  const int width = min(pairs - before, args.group);
  const int within = unit - before * args.splits;
  const int split = within / width;
  return {(before + within % width) * kPairRows, split, split_begin(split, args.splits, args.tiles),
          split_begin(split + 1, args.splits, args.tiles)};
}

// A place in the ring of stages.
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

struct Ring {
  uint32_t stages, full, empty;  // addresses in shared memory
  __device__ uint32_t hidden(int stage) const { return stages + stage * kStageBytes; }
  __device__ uint32_t weight(int stage) const { return stages + stage * kStageBytes + kBoxBytes; }
  __device__ uint32_t full_at(int stage) const { return full + 8 * stage; }
  __device__ uint32_t empty_at(int stage) const { return empty + 8 * stage; }
};

// One thread fills the ring.
__device__ void load_units(const CUtensorMap& hidden, const CUtensorMap& weight, const ProductArgs& args,
                           const Ring& ring, int pairs, int rank) {
  Place at;
  for (int u = blockIdx.x / kBlocks; u < pairs * args.splits; u += gridDim.x / kBlocks) {
    const Unit unit = unit_at(args, pairs, u);
    const int row = unit.first_row + rank * kRows;
    for (int tile = unit.first_tile; tile < unit.last_tile; ++tile) {
      for (int k = 0; k < args.depth_steps; ++k, at.advance()) {
        const uint32_t full = ring.full_at(at.stage);
        hopper::barrier_wait(ring.empty_at(at.stage), at.parity ^ 1);
        hopper::barrier_expect(full, kStageBytes);
        hopper::load_box(hidden, ring.hidden(at.stage), full, k * kDepth, row);
        const int column = tile * kTileColumns;
        if (args.multicast) {
          hopper::load_box(weight, ring.weight(at.stage) + rank * kBoxBytes, full, k * kDepth, column + rank * kRows,
                           (1 << kBlocks) - 1);
        } else {
          hopper::load_box(weight, ring.weight(at.stage), full, k * kDepth, column);
          hopper::load_box(weight, ring.weight(at.stage) + kBoxBytes, full, k * kDepth, column + kRows);
        }
      }
    }
  }
}

// One warpgroup multiplies and folds its 64 rows of the block.
template <DType dtype, Transform transform, bool folds>
__device__ void fold_units(const ProductArgs& args, const Ring& ring, int pairs, int rank, int warpgroup) {
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t own_rows = warpgroup * (kRows / 2) * kDepth * 2;
  float z[kHeld][kLaneLogits];
  Place at;
  const auto release = [&](int stage) {
    if (lane < kBlocks) hopper::barrier_arrive(ring.empty_at(stage), lane);
  };
  for (int u = blockIdx.x / kBlocks; u < pairs * args.splits; u += gridDim.x / kBlocks) {
    const Unit unit = unit_at(args, pairs, u);
    RowLane rows[kHeld][2] = {{empty_row(), empty_row()}};
    for (int tile = unit.first_tile; tile < unit.last_tile; ++tile) {
      if (args.lag && warpgroup == 1) hopper::named_sync(kLagBarrier, 2 * kWarpgroup);
      int previous = 0;
      for (int k = 0; k < args.depth_steps; ++k, at.advance()) {
        hopper::barrier_wait(ring.full_at(at.stage), at.parity);
        const uint64_t a = hopper::matrix_descriptor(ring.hidden(at.stage) + own_rows);
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
      if constexpr (folds) {
        finish_logits<transform>(z, tile * kTileColumns, args.logits);
        fold_tile(z, tile * kTileColumns, rows);
      }
    }
    combine_lanes(rows);
    const int row = unit.first_row + rank * kRows + warpgroup * (kRows / 2) + 16 * warp + lane / kSharing;
    if (lane % kSharing == 0) {
      RowPartial* partials = args.partials + int64_t(unit.split) * args.rows + row;
      if (row < args.rows) partials[0] = partial_of(rows[0][0]);
      if (row + 8 < args.rows) partials[8] = partial_of(rows[0][1]);
    }
  }
}

template <DType dtype, Transform transform, bool folds>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    product_fold(const __grid_constant__ CUtensorMap hidden /* [rows, depth] */,
                 const __grid_constant__ CUtensorMap weight /* [vocab, depth] */,
                 const __grid_constant__ ProductArgs args) {
  extern __shared__ char shared[];
  const uint32_t begin = (hopper::shared_address(shared) + 1023) & ~1023u;  // as the swizzle wants it
  const Ring ring = {begin, begin + kStages * kStageBytes, begin + kStages * kStageBytes + 8 * kStages};
  const int rank = hopper::cluster_rank();
  const int pairs = ((args.count ? *args.count : args.rows) + kPairRows - 1) / kPairRows;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
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
    fold_units<dtype, transform, folds>(args, ring, pairs, rank, threadIdx.x / kWarpgroup - 1);
  }
  __syncwarp();
  hopper::cluster_sync();  // the other block may still write to this one's memory and barriers
}

constexpr int kPackRows = 8;  // of a block, one a warp

struct PackArgs {
  Matrix hidden, weight;   // of the chunk's rows, of the vocabulary
  const int64_t* targets;  // [rows] or null
  int64_t vocab_start;
  Logits logits;
  bool capped, vectors;  // vectors: hidden states in 16-byte loads
  uint16_t* packed;      // [rows, pitch], written: the scored rows, first to last
  int pitch;
  int* position;         // [rows], written: a row's place in `packed`, -1 if ignored
  float* target_logit;   // [rows], written: -inf where the target is not of this vocabulary
  int* count;            // [1], written: scored rows
};

// Eight elements from column `begin` on, zero beyond the last.
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
  const int row = first + warp, rows = static_cast<int>(args.hidden.rows);
  const auto scored = [&](int i) { return i < rows && (!args.targets || args.targets[i] != -100); };
  int place = row;
  if (args.targets) {  // every block counts the rows before its own
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
  if (lane == 0 && row == rows - 1) *args.count = place + here;
  if (row >= rows) return;
  if (lane == 0) args.position[row] = here ? place : -1;
  if (!here) return;
  const int64_t target = args.targets ? args.targets[row] - args.vocab_start : -1;
  const bool owned = target >= 0 && target < args.weight.rows;
  const auto* source = static_cast<const uint16_t*>(args.hidden.data) + row * args.hidden.row_stride;
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
  const int* position;        // [rows] or null: a row's partials are at its own number
  const int64_t* targets;     // [rows] or null
  const float* target_logit;  // [rows], where targets are
  int64_t vocab_start, all_rows;
  double* state;   // [7, all_rows], `rows` of them written
  int64_t* index;  // [all_rows], likewise
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
  if (s.index >= 0) s.index += args.vocab_start;
  if (args.targets && at >= 0) {
    // The maximum's own logit, not one summed in another order: a confident row's logprob is -log1p(R).
    s.target = args.targets[row] == s.index ? s.max : double(args.target_logit[row]);
  }
  const double values[7] = {s.max, s.second, s.sums.r, s.sums.s1, s.sums.s2, s.sums.s11, s.target};
  for (int i = 0; i < 7; ++i) args.state[i * args.all_rows + row] = at >= 0 ? values[i] : NAN;
  args.index[row] = at >= 0 ? s.index : -1;
}

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("cuda row_stats: ") + call + ": " + cudaGetErrorString(error));
}

template <typename T>
T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Whether the copy engine can address `m`, and 16-byte loads its rows.
bool addressable(const Matrix& m) {
  return m.column_stride == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.row_stride * 2 % 16 == 0 &&
         m.row_stride >= m.columns && m.row_stride * 2 < int64_t(1) << 40;
}

bool packs(const RowStatsArgs& args) { return args.targets || !addressable(args.hidden); }

// The chunk's part of the scratch memory; offsets are of 256 bytes.
struct Layout {
  int64_t rows;  // of a chunk
  int splits, pitch;
  int64_t partials, position, target_logit, count, bytes;
};

Layout layout_of(const RowStatsArgs& args, const ProductPlan& plan) {
  const int64_t n = args.hidden.rows;
  Layout layout;
  layout.splits = static_cast<int>(std::min<int64_t>(plan.splits, ceil_div<int64_t>(args.weight.rows, kTileColumns)));
  layout.pitch = static_cast<int>(ceil_div<int64_t>(args.hidden.columns, 8) * 8);
  const int64_t row_bytes = layout.splits * int64_t(sizeof(RowPartial)) + (packs(args) ? 2 * layout.pitch + 8 : 0);
  const int64_t pairs = ceil_div<int64_t>(n, kPairRows);
  const int64_t most = std::max<int64_t>(kScratchBytes / row_bytes / kPairRows, 1);
  const int64_t chunks = std::max<int64_t>(ceil_div(pairs, most), 1);  // of nearly equal length
  layout.rows = std::min(n, ceil_div(pairs, chunks) * kPairRows);
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
  layout.bytes = end;
  return layout;
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver that the runtime found: nothing here is linked against it.
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

template <DType dtype, Transform transform, bool folds>
void launch_product(const CUtensorMap& hidden, const CUtensorMap& weight, const ProductArgs& args,
                    const Launch& launch) {
  const auto kernel = product_fold<dtype, transform, folds>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "cudaFuncSetAttribute");
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, launch.device),
        "cudaDeviceGetAttribute");
  const int units = ceil_div(args.rows, kPairRows) * args.splits;
  const int clusters = std::max(std::min(units, multiprocessors / kBlocks), 1);
  kernel<<<clusters * kBlocks, kThreads, kSharedBytes, static_cast<cudaStream_t>(launch.stream)>>>(hidden, weight,
                                                                                                    args);
  check(cudaGetLastError(), "launch of product_fold");
}

template <DType dtype>
void launch_product(const CUtensorMap& hidden, const CUtensorMap& weight, const ProductArgs& args, bool capped,
                    bool folds, const Launch& launch) {
  if (!folds) return launch_product<dtype, Transform::kNone, false>(hidden, weight, args, launch);
  if (capped) return launch_product<dtype, Transform::kCapped, true>(hidden, weight, args, launch);
  if (changes(args.logits)) {
    return launch_product<dtype, Transform::kAffine, true>(hidden, weight, args, launch);
  }
  launch_product<dtype, Transform::kNone, true>(hidden, weight, args, launch);
}

template <DType dtype>
void launch_chunks(const RowStatsArgs& args, const Launch& launch, const ProductPlan& plan, const Layout& layout) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  auto* scratch = static_cast<char*>(launch.scratch);
  const Matrix &h = args.hidden, &w = args.weight;
  const bool capped = args.softcap != 0, pack = packs(args);
  const Logits logits = logits_of(args, static_cast<int>(w.rows));
  const CUtensorMap weight = tensor_map(w.data, w.rows, w.columns, w.row_stride, dtype);
  auto* partials = reinterpret_cast<RowPartial*>(scratch + layout.partials);
  auto* position = reinterpret_cast<int*>(scratch + layout.position);
  auto* target_logit = reinterpret_cast<float*>(scratch + layout.target_logit);
  auto* count = reinterpret_cast<int*>(scratch + layout.count);
  for (int64_t first = 0; first < h.rows; first += layout.rows) {
    Matrix part = h;
    part.data = static_cast<const uint16_t*>(h.data) + first * h.row_stride;
    part.rows = std::min(layout.rows, h.rows - first);
    const int rows = static_cast<int>(part.rows);
    const int64_t* targets = args.targets ? args.targets + first : nullptr;
    if (pack) {
      const PackArgs arguments = {part,    w,           targets,      args.vocab_start, logits,      capped,
                                  addressable(part),    reinterpret_cast<uint16_t*>(scratch), layout.pitch, position,
                                  target_logit, count};
      pack_rows<dtype><<<ceil_div(rows, kPackRows), kPackRows * kWarp, 0, stream>>>(arguments);
      check(cudaGetLastError(), "launch of pack_rows");
    }
    const CUtensorMap hidden = pack ? tensor_map(scratch, rows, h.columns, layout.pitch, dtype)
                                    : tensor_map(part.data, rows, h.columns, h.row_stride, dtype);
    const int steps = static_cast<int>(ceil_div<int64_t>(h.columns, kDepth));
    const ProductArgs arguments = {pack ? count : nullptr,
                                   rows,
                                   steps,
                                   static_cast<int>(ceil_div<int64_t>(w.rows, kTileColumns)),
                                   layout.splits,
                                   plan.group,
                                   steps > kStages ? plan.lag : 0,  // so that it leads by less than a tile
                                   plan.multicast,
                                   logits,
                                   partials};
    launch_product<dtype>(hidden, weight, arguments, capped, plan.fold, launch);
    const MergeArgs merging = {partials,         layout.splits, rows,   pack ? position : nullptr, targets, target_logit,
                               args.vocab_start, h.rows,        args.state + first, args.index + first};
    merge_splits<<<ceil_div(rows * kMergeLanes, kMergeThreads), kMergeThreads, 0, stream>>>(merging);
    check(cudaGetLastError(), "launch of merge_splits");
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
