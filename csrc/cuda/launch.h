// The operations of the cuda backend, as called by bindings/register_cuda.cpp. Pointers are device pointers.
#pragma once
#include <cstdint>
#include <string>

#include "../cpu/matrix.h"

namespace acqcore::cuda {

struct LogitStatsArgs {
  Matrix logits;           // [N, V], V < 2^30
  const int64_t* targets;  // [N] or null, -100: the row is ignored
  double temperature;
  int64_t vocab_start;     // index of the first column in the whole vocabulary
  bool accumulate;         // merge with the results of earlier columns in state and index
  double* state;           // [7, N], written
  int64_t* index;          // [N], written
};

// Where to launch. `scratch` is device memory of at least scratch_bytes(), used in stream order.
struct Launch {
  int device;
  void* stream;  // cudaStream_t
  void* scratch;
  int64_t scratch_bytes;
};

// The reason why no device can run the operations, or "".
std::string unavailable();

// Scratch memory that logit_stats needs on the device, at most 16 MiB (more only if a single row needs it).
int64_t scratch_bytes(int device, int64_t rows, int64_t columns);

// Queues the operation. Throws std::runtime_error naming the operation, the CUDA call and the cause.
void logit_stats(const LogitStatsArgs& args, const Launch& launch);

// The same on the host, from host memory, with the work distributed as on `multiprocessors` multiprocessors.
void logit_stats_on_host(const LogitStatsArgs& args, int multiprocessors);

// A place in the blocks of 128 rows in which samples with a Gram matrix are folded.
struct alignas(16) Slot {
  int32_t row;          // row of hidden, -1 for none
  int16_t first, last;  // slots of its sample, relative to the block
  int64_t start;        // offset of its sample's matrix in `products`, -1 for none
};

// Gram matrices computed along with the row states: see acqcore/backends/base.py.
struct GramArgs {
  const Slot* slots = nullptr;  // [count] or null: no matrices, every row of hidden is folded
  int64_t count = 0;            // a multiple of 256
  float* products = nullptr;    // written
};

struct RowStatsArgs {
  Matrix hidden;           // [N, D] bfloat16 or float16
  Matrix weight;           // [V, D] of the same dtype, V < 2^30; rows contiguous and 16-byte aligned
  const float* bias;       // [V] or null
  const int64_t* targets;  // [N] or null, -100: the row is ignored
  double softcap;          // 0: none
  double scale;
  double temperature;
  int64_t vocab_start;  // index of weight's first row in the whole vocabulary
  double* state;        // [7, N], written
  int64_t* index;       // [N], written
  GramArgs gram = {};   // requires targets and softcap 0
};

// How the fused product is partitioned and scheduled on sm_90. Results depend on `splits` alone.
struct ProductPlan {
  int splits = 0;  // maximum number of splits of the vocabulary; 0: chosen from its size
  int group = 8;   // pairs of row blocks that walk the vocabulary together
  int lag = 3;     // maximum steps of depth 64 by which the second warpgroup trails the first
};

// Scratch memory that row_stats_sm90 needs on the device, at most 56 MiB (more only if 256 rows need it).
int64_t row_stats_sm90_scratch(const RowStatsArgs& args, const ProductPlan& plan = {});

// Queues the operation on a device of compute capability 9.0. Throws like logit_stats.
void row_stats_sm90(const RowStatsArgs& args, const Launch& launch, const ProductPlan& plan = {});

// Folds float32 products [N, V] on the host, from host memory, as row_stats_sm90 does. hidden, weight and targets of
// `args` are not read.
void fold_tiles_on_host(const Matrix& products, const RowStatsArgs& args, int splits);

}  // namespace acqcore::cuda
