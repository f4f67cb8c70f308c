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

}  // namespace acqcore::cuda
