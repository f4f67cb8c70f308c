// Row statistics of materialized logits, read once; rows are distributed over threads.
#include "fold.h"
#include "isa.h"
#include "load.h"
#include "parallel.h"

namespace acqcore::ACQCORE_ISA {
namespace {

constexpr int kBlock = 1024;  // logits folded at a time, in L1

// Folds columns [begin, begin + n) of a row, converted into `buffer` unless they are contiguous float32 in memory.
inline void fold_block(const LogitStatsArgs& args, int64_t row, int64_t begin, int n, float* buffer /* [kBlock] */,
                       LaneState& lanes) {
  const Matrix& m = args.logits;
  const float* z = buffer;
  if (m.dtype == DType::kFloat32 && m.column_stride == 1 && args.temperature == 1.0f && n % kLanes == 0) {
    z = static_cast<const float*>(m.data) + row * m.row_stride + begin;
  } else {
    load_floats(m, row, begin, n, buffer);
    for (int i = 0; i < n; ++i) buffer[i] /= args.temperature;
    for (; n % kLanes != 0; ++n) buffer[n] = -INFINITY;
  }
  const int64_t target = args.targets ? args.targets[row] - begin : -1;
  if (target >= 0 && target < n) lanes.target = z[target];
  fold(z, n, begin, lanes);
}

}  // namespace

bool logit_stats(const LogitStatsArgs& args) {
  const int64_t rows = args.logits.rows, columns = args.logits.columns;
#pragma omp parallel for num_threads(args.threads) schedule(dynamic, 4)
  for (int64_t row = 0; row < rows; ++row) {
    if (args.targets && args.targets[row] == -100) {
      write_state(nullptr, row, rows, args.state, args.index);
      continue;
    }
    alignas(64) float buffer[kBlock];
    RowState total;
    clear(total);
    for (int64_t stretch = 0; stretch < columns; stretch += kStretch) {
      const int64_t end = stretch + kStretch < columns ? stretch + kStretch : columns;
      LaneState lanes;
      clear(lanes);
      for (int64_t begin = stretch; begin < end; begin += kBlock) {
        const int n = static_cast<int>(end - begin < kBlock ? end - begin : kBlock);
        fold_block(args, row, begin, n, buffer, lanes);
      }
      merge(total, reduce(lanes));
    }
    write_state(&total, row, rows, args.state, args.index);
  }
  return true;
}

}  // namespace acqcore::ACQCORE_ISA
