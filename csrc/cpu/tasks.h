// Tasks that threads take in turn, each with its own workspace.
#pragma once
#include "parallel.h"
#include "tiles.h"

namespace acqcore::ACQCORE_ISA {

// Calls run(task, workspace) for each task in [0, count). `carve` takes a workspace's pieces from an Arena. False if
// memory is missing.
template <typename Carve, typename Run>
inline bool run_tasks(int threads, int64_t count, const Carve& carve, const Run& run) {
  Arena layout(nullptr);
  carve(layout);
  Scratch scratch(threads * layout.used());
  if (scratch.missing()) return false;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < count; ++task) {
    const Tiles tiles;
    Arena arena(scratch.as<char>() + thread_number() * layout.used());
    run(task, carve(arena));
  }
  return true;
}

}  // namespace acqcore::ACQCORE_ISA
