// The operations of the cpu backend and the instruction sets they are compiled for.
//
// Every algorithm is written once. CMake compiles it once per instruction set, in a namespace of that name, and
// dispatch.cpp picks a table at run time. Code in those namespaces uses no std:: templates: the linker keeps one copy of
// an inline function, and it might keep the one that an older processor can not run.
#pragma once
#include <cstdint>

#include "matrix.h"

namespace acqcore {

struct RowStatsArgs {
  int threads;
  Matrix hidden;           // [N, D]
  Matrix weight;           // [V, D]
  const float* bias;       // [V] or null
  const int64_t* targets;  // [N] or null, -100: the row is ignored
  float softcap;           // 0: none
  float scale;
  float temperature;
  int64_t vocab_start;
  double* state;   // [7, N], written; rows as STATE_ROWS in row_stats.py
  int64_t* index;  // [N], written
};

struct LogitStatsArgs {
  int threads;
  Matrix logits;           // [N, V]
  const int64_t* targets;  // [N] or null, -100: the row is ignored
  float temperature;
  double* state;   // [7, N], written
  int64_t* index;  // [N], written
};

// One instruction set's operations. Each returns false if scratch memory could not be had.
struct Operations {
  bool (*row_stats)(const RowStatsArgs&);
  bool (*logit_stats)(const LogitStatsArgs&);
};

struct Isa {
  const char* name;
  bool (*supported)();  // by this processor
  const Operations* operations;
};

// All known instruction sets, best last.
const Isa* isas(int* count);
const Isa* find_isa(const char* name);
const Isa* best_isa();

}  // namespace acqcore
