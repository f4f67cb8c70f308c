// The cuda backend's arithmetic on the host, warp by warp, for tests without a GPU.
#include <vector>

#include "groups.cuh"

namespace acqcore::cuda {
namespace {

template <DType dtype>
void run(const LogitStatsArgs& args, int multiprocessors) {
  const Plan p = plan(args.logits.rows, args.logits.columns, multiprocessors);
  const Exponential exponential = exponential_of(args.temperature);
  const bool vectors = loads_vectors(args.logits);
  std::vector<GroupState> groups(p.groups);
  for (int64_t i = 0; i < args.logits.rows; ++i) {
    if (ignored(args, i)) {
      write_state(args, i, nullptr);
      continue;
    }
    const Row<dtype> row = row_of<dtype>(args.logits, i, vectors);
    for (int part = 0; part < p.parts; ++part) {
      for (int warp = 0; warp < p.warps; ++warp) fold_share(row, p, part, warp, exponential, groups.data());
    }
    finish_row(args, i, row, groups.data(), p.groups);
  }
}

}  // namespace

void logit_stats_on_host(const LogitStatsArgs& args, int multiprocessors) {
  switch (args.logits.dtype) {
    case DType::kFloat32:
      return run<DType::kFloat32>(args, multiprocessors);
    case DType::kBFloat16:
      return run<DType::kBFloat16>(args, multiprocessors);
    case DType::kFloat16:
      return run<DType::kFloat16>(args, multiprocessors);
  }
}

}  // namespace acqcore::cuda
