// The fold of the fused product on the host, lane by lane, for tests without a GPU.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "launch.h"
#include "tile_fold.cuh"

namespace acqcore::cuda {
namespace {

constexpr int kWarpRows = 16;

template <Transform transform>
void fold_rows(const Matrix& products, int64_t first, int begin_tile, int end_tile, const Logits& logits,
               RowPartial* partials /* [16] written */) {
  float z[kHeld][kLaneLogits];
  RowLane rows[kHeld][2];
  Raised raised[kHeld][2];
  for (auto& lane : rows) lane[0] = lane[1] = empty_row();
  const auto* data = static_cast<const float*>(products.data);
  for (int tile = begin_tile; tile < end_tile; ++tile) {
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int i = 0; i < kLaneLogits; ++i) {
        const int64_t row = std::min(first + lane / kSharing + 8 * (i / 2 % 2), products.rows - 1);
        const int64_t column = int64_t(tile) * kTileColumns + column_of_register(lane, i);
        z[lane][i] =
            column < products.columns ? data[row * products.row_stride + column * products.column_stride] : 0.0f;
      }
    }
    finish_logits<transform>(z, tile * kTileColumns, logits);
    fold_tile<false>(z, tile * kTileColumns, rows, raised);
  }
  combine_lanes(rows);
  for (int row = 0; row < kWarpRows; ++row) partials[row] = partial_of(rows[row % 8 * kSharing][row / 8]);
}

}  // namespace

void fold_tiles_on_host(const Matrix& products, const RowStatsArgs& args, int splits) {
  if (products.dtype != DType::kFloat32) throw std::invalid_argument("products: expected float32");
  const Logits logits = logits_of(args, int(products.columns));
  const int tiles = int((products.columns + kTileColumns - 1) / kTileColumns);
  splits = std::min(splits, tiles);
  std::vector<RowPartial> partials(splits * kWarpRows);
  for (int64_t first = 0; first < products.rows; first += kWarpRows) {
    for (int split = 0; split < splits; ++split) {
      const int begin = split_begin(split, splits, tiles), end = split_begin(split + 1, splits, tiles);
      RowPartial* out = partials.data() + split * kWarpRows;
      if (args.softcap != 0) {
        fold_rows<Transform::kCapped>(products, first, begin, end, logits, out);
      } else if (changes(logits)) {
        fold_rows<Transform::kAffine>(products, first, begin, end, logits, out);
      } else {
        fold_rows<Transform::kNone>(products, first, begin, end, logits, out);
      }
    }
    for (int64_t row = first; row < std::min(first + kWarpRows, products.rows); ++row) {
      RowState lanes[kMergeLanes];
      for (int lane = 0; lane < kMergeLanes; ++lane) {
        lanes[lane] = merged_stretch(partials.data() + row - first, kWarpRows, lane, splits);
      }
      for (int apart = 1; apart < kMergeLanes; apart *= 2) {
        for (int lane = 0; lane < kMergeLanes; lane += 2 * apart) merge(lanes[lane], lanes[lane + apart]);
      }
      const RowState& s = lanes[0];
      const double values[7] = {s.max,      s.second,   s.sums.r,  s.sums.s1,
                                s.sums.s2,  s.sums.s11, s.target};
      for (int i = 0; i < 7; ++i) args.state[i * products.rows + row] = values[i];
      args.index[row] = s.index < 0 ? -1 : s.index + args.vocab_start;
    }
  }
}

}  // namespace acqcore::cuda
