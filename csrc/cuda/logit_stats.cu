// Row statistics of materialized logits: reads them once, at memory bandwidth.
#include <cuda_runtime.h>

#include <stdexcept>

#include "groups.cuh"

namespace acqcore::cuda {
namespace {

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("cuda logit_stats: ") + call + ": " + cudaGetErrorString(error));
}

template <DType dtype>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    fold_rows(const __grid_constant__ LogitStatsArgs args, const __grid_constant__ Plan plan, Exponential exponential,
              bool vectors, int64_t first, GroupState* scratch /* [rows of the pass, groups] */) {
  extern __shared__ GroupState shared[];
  const int64_t local = blockIdx.x / plan.parts;
  const int part = blockIdx.x % plan.parts, warp = threadIdx.x / kWarp;
  if (ignored(args, first + local)) {
    if (part == 0 && threadIdx.x == 0) write_state(args, first + local, nullptr);
    return;
  }
  const Row<dtype> row = row_of<dtype>(args.logits, first + local, vectors);
  GroupState* groups = plan.parts == 1 ? shared : scratch + local * plan.groups;
  fold_share(row, plan, part, warp, exponential, groups);
  if (plan.parts > 1) return;
  __syncthreads();
  if (warp == 0) finish_row(args, first + local, row, groups, plan.groups);
}

// Combines rows that several blocks shared, one warp per row.
template <DType dtype>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    combine_rows(const __grid_constant__ LogitStatsArgs args, int groups, bool vectors, int64_t first, int64_t rows,
                 const GroupState* scratch /* [rows, groups] */) {
  const int64_t local = int64_t(blockIdx.x) * kMaxWarps + threadIdx.x / kWarp;
  if (local >= rows || ignored(args, first + local)) return;
  finish_row(args, first + local, row_of<dtype>(args.logits, first + local, vectors), scratch + local * groups, groups);
}

template <DType dtype>
void launch_passes(const LogitStatsArgs& args, const Plan& p, const Launch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  auto* scratch = static_cast<GroupState*>(launch.scratch);
  const bool vectors = loads_vectors(args.logits);
  const size_t shared = p.parts == 1 ? p.groups * sizeof(GroupState) : 0;
  for (int64_t first = 0; first < args.logits.rows; first += p.rows_per_pass) {
    const int64_t left = args.logits.rows - first;
    const int64_t rows = left < p.rows_per_pass ? left : p.rows_per_pass;
    const unsigned blocks = static_cast<unsigned>(rows * p.parts);
    fold_rows<dtype><<<blocks, p.warps * kWarp, shared, stream>>>(args, p, exponential_of(args.temperature), vectors,
                                                                   first, scratch);
    check(cudaGetLastError(), "launch of fold_rows");
    if (p.parts == 1) continue;
    const unsigned combining = static_cast<unsigned>((rows + kMaxWarps - 1) / kMaxWarps);
    combine_rows<dtype><<<combining, kMaxWarps * kWarp, 0, stream>>>(args, p.groups, vectors, first, rows, scratch);
    check(cudaGetLastError(), "launch of combine_rows");
  }
}

Plan plan_for(int device, int64_t rows, int64_t columns) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return plan(rows, columns, multiprocessors);
}

}  // namespace

std::string unavailable() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return std::string("cudaGetDeviceCount: ") + cudaGetErrorString(error);
  std::string old;
  for (int device = 0; device < devices; ++device) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    if (major >= 8) return "";
    old += " " + std::to_string(major) + "." + std::to_string(minor);
  }
  return "it needs a device of compute capability 8.0 or later, found" + (old.empty() ? " none" : old);
}

int64_t scratch_bytes(int device, int64_t rows, int64_t columns) { return scratch_of(plan_for(device, rows, columns)); }

void logit_stats(const LogitStatsArgs& args, const Launch& launch) {
  check(cudaSetDevice(launch.device), "cudaSetDevice");
  const Plan p = plan_for(launch.device, args.logits.rows, args.logits.columns);
  if (launch.scratch_bytes < scratch_of(p)) {
    throw std::invalid_argument("scratch: expected at least " + std::to_string(scratch_of(p)) + " bytes, got " +
                                std::to_string(launch.scratch_bytes));
  }
  switch (args.logits.dtype) {
    case DType::kFloat32:
      return launch_passes<DType::kFloat32>(args, p, launch);
    case DType::kBFloat16:
      return launch_passes<DType::kBFloat16>(args, p, launch);
    case DType::kFloat16:
      return launch_passes<DType::kFloat16>(args, p, launch);
  }
}

}  // namespace acqcore::cuda
