// The operations of the cuda backend: what bindings/register_cuda.cpp hands over. Pointers are the device's.
#pragma once
#include <cstdint>
#include <string>

#include "../cpu/matrix.h"

namespace acqcore::cuda {

struct LogitStatsArgs {
  Matrix logits;           // [N, V], V < 2^30
  const int64_t* targets;  // [N] or null, -100: the row is ignored
  double temperature;
  int64_t vocab_start;     // of the first column in the whole vocabulary
  bool accumulate;         // state and index hold those of earlier columns: they are merged with
  double* state;           // [7, N], written
  int64_t* index;          // [N], written
};

// Where a launch goes. `scratch` is device memory of at least scratch_bytes(); its last use is in `stream`'s order.
struct Launch {
  int device;
  void* stream;  // cudaStream_t
  void* scratch;
  int64_t scratch_bytes;
};

// Why no device here can run the operations, or "".
std::string unavailable();

// Device memory that logit_stats uses beside its arguments, at most 16 MiB (more only where one row needs it).
int64_t scratch_bytes(int device, int64_t rows, int64_t columns);

// Queues the operation. Throws std::runtime_error naming the operation, the CUDA call and its cause.
void logit_stats(const LogitStatsArgs& args, const Launch& launch);

// The same computed by the host from host memory, as `multiprocessors` would share it out.
void logit_stats_on_host(const LogitStatsArgs& args, int multiprocessors);

// A place in the blocks of 128 rows in which samples are folded that keep a Gram matrix.
struct alignas(16) Slot {
  int32_t row;          // of hidden, -1 for none
  int16_t first, last;  // slots of its sample, from the block's start
  int64_t start;        // of its sample's matrix in `products`, -1 for none
};

// Gram matrices kept beside the row states: see acqcore/backends/base.py.
struct GramArgs {
  const Slot* slots = nullptr;  // [count] or null: no matrices, and every row of hidden is folded
  int64_t count = 0;            // a multiple of 256
  float* products = nullptr;    // written
};

struct RowStatsArgs {
  Matrix hidden;           // [N, D] bfloat16 or float16
  Matrix weight;           // [V, D] of the same dtype, V < 2^30; rows contiguous and on 16 bytes
  const float* bias;       // [V] or null
  const int64_t* targets;  // [N] or null, -100: the row is ignored
  double softcap;          // 0: none
  double scale;
  double temperature;
  int64_t vocab_start;  // of the first row of weight in the whole vocabulary
  double* state;        // [7, N], written
  int64_t* index;       // [N], written
  GramArgs gram = {};   // with it: targets are not null, softcap is 0
};

// How the fused product is cut and run on sm_90. Results follow from `splits` alone.
struct ProductPlan {
  int splits = 0;  // of the vocabulary, at most; 0: as many as suit it
  int group = 8;   // pairs of row blocks that walk the vocabulary side by side
  int lag = 3;     // steps of depth 64 that the second warpgroup starts behind the first, at most
};

// Device memory that row_stats_sm90 uses beside its arguments, at most 56 MiB (more only where 256 rows need it).
int64_t row_stats_sm90_scratch(const RowStatsArgs& args, const ProductPlan& plan = {});

// Queues the operation on a device of compute capability 9.0. Throws as logit_stats does.
void row_stats_sm90(const RowStatsArgs& args, const Launch& launch, const ProductPlan& plan = {});

// The fold of float32 products [N, V] as row_stats_sm90 does it, by the host from host memory. Of `args`, hidden, weight
// and targets are not read.
void fold_tiles_on_host(const Matrix& products, const RowStatsArgs& args, int splits);

}  // namespace acqcore::cuda
