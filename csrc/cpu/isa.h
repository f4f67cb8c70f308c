// The operations of the cpu backend and the instruction sets they are compiled for.
//
// CMake compiles every algorithm once per instruction set, in a namespace of that name, and dispatch.cpp picks a table
// at run time. Code in those namespaces uses no std:: templates: the linker keeps only one copy of an inline function,
// possibly one that an older processor cannot run.
#pragma once
#include <cstdint>

#include "matrix.h"

namespace acqcore {

// Hidden states and the head above them: z = cap(scale (W h + b)) / temperature.
struct HeadArgs {
  int threads;
  Matrix hidden;           // [N, D]
  Matrix weight;           // [V, D]
  const float* bias;       // [V] or null
  const int64_t* targets;  // [N] or null, -100: the row is ignored
  float softcap;           // 0: none
  float scale;
  float temperature;
  int64_t vocab_start;
};

// Gram matrices of samples, sum_v f_s[v] f_t[v] as defined in backends/base.py; none if samples is 0.
struct GramArgs {
  const int64_t* bounds;  // [samples, 2], begin and end rows, ascending
  int64_t samples;
  float* products;        // [sum T_i^2], written
};

enum class Draws {
  kGiven,    // hidden holds every draw's states
  kElement,  // dropout of columns
  kBlock,    // dropout of blocks of columns
};

// Dropout that generates the draws: a unit is kept if its random word (philox.h) is at least `threshold`.
struct Dropout {
  Draws form;
  int64_t block;       // columns that drop together; the last block may be shorter
  uint32_t threshold;  // floor(p 2^32)
  float inverse_keep;  // 1 / (1 - p)
  uint64_t seed;
  const int64_t* samples;    // [N]
  const int64_t* positions;  // [N], in the sample
};

// Draws of block dropout, folded beside the rows themselves; none if draws is 0.
struct BlockDraws {
  Dropout dropout;  // Draws::kBlock
  int draws;        // K
  float* norms;     // [N, K, 2], written: each draw's largest logit m and log(Z e^-m)
  double* state;    // [6, N], rows 0 and 3 written; rows as in bayes.py
  int64_t* votes;   // [K, N], written: each draw's largest logit
};

struct RowStatsArgs {
  HeadArgs head;   // with targets if there are samples
  GramArgs gram;
  BlockDraws drawn;
  double* state;   // [7, N], written; rows as in backends/base.py
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

// Squared norms of the samples' head gradients, including the bias's, from their Grams.
struct GramNormArgs {
  HeadArgs head;            // with targets
  const double* state;      // [7, N], over the whole vocabulary
  const int64_t* index;     // [N], over the whole vocabulary
  GramArgs gram;            // filled
  const double* local_max;  // [N], the maxima that the Grams are relative to
  const double* weights;    // [N]
  double* squared;          // [samples], written
};

// The state and Grams of RowStatsArgs, and sums over the vocabulary; `values` and `hashed` may be null.
struct DeltaSumsArgs {
  HeadArgs head;          // with targets
  GramArgs gram;
  double* state;          // [7, N], written
  int64_t* index;         // [N], written
  float* values;          // [N, D], written: sum_v exp(z_v - m) cap'_v W_v over all columns but the row's target
  const int32_t* places;  // as in DeltaHashArgs
  int64_t columns;        // n
  float* hashed;          // [N, n], written: as by DeltaHashArgs, for a whole vocabulary
};

// Delta hashed to n places; delta [N, V] as in head_grad.py, zero in ignored rows.
struct DeltaHashArgs {
  HeadArgs head;          // with targets
  const double* state;    // [7, N]
  const int64_t* index;   // [N]
  const int32_t* places;  // [V], of rotated_places: column v is added to place p, or subtracted from ~p if p < 0
  int64_t columns;        // n
  float* out;             // [N, n], written
};

// Signed sums of the columns that share a place.
struct HashColumnsArgs {
  int threads;
  const float* values;    // [rows, columns]
  int64_t rows;
  int64_t columns;
  const int32_t* places;  // [columns], encoded as in DeltaHashArgs
  int64_t dim;            // number of places
  float* out;             // [rows, dim], written
};

// The state of RowStatsArgs, and the sums over the vocabulary that give random cotangents of the logits; the sums are
// zero in ignored rows.
struct FisherSumsArgs {
  HeadArgs head;             // with targets
  double* state;             // [7, N], written
  int64_t* index;            // [N], written
  int probes;                // P
  uint64_t seed;             // for the signs
  const int64_t* samples;    // [N]
  const int64_t* positions;  // [N], in the sample
  float* sums;               // [P + 1, N, D], written: sums of e cap' W, then of sqrt(e) r cap' W for each probe
  double* signed_sums;       // [P, N], written: sums of sqrt(e) r
  double* squares;           // [N], written: sums of e cap'^2 |W|^2
};

// Squared norms of each sample's head gradient, sum_t weights_t delta_t h_t^T, including the bias's.
struct HeadGradNormArgs {
  HeadArgs head;           // with targets
  const double* state;     // [7, N], of row_stats for the same head
  const int64_t* index;    // [N], of the same call
  const int64_t* bounds;   // [samples, 2], begin and end
  int64_t samples;
  const double* weights;  // [N]
  double* squared;        // [samples], written
};

// Statistics of K softmax rows and of their mean, for each of N rows.
struct MixtureStatsArgs {
  HeadArgs head;               // hidden [N, D], or [K * N, D] draw by draw for Draws::kGiven; targets [N]
  int64_t rows;                // N
  int draws;                   // K
  Dropout dropout;
  int members;                 // number of heads: 1, or K if every draw has its own
  const Matrix* weights;       // [members], each [V, D]
  const float* const* biases;  // [members], each [V] or null
  double* state;               // [6, N], written; rows as in bayes.py
  int64_t* votes;              // [K, N], written: each draw's largest logit
  GramArgs gram;               // block form, as for row_stats
  double* row_state;           // block form: [7, N] of the rows without dropout, written, or null
  int64_t* row_index;          // [N] with row_state
};

// The masks of every draw at one site of the model. Site 0 is the last hidden state, masked by mixture_stats itself.
struct DropoutMaskArgs {
  int threads;
  Dropout dropout;
  int site;
  int64_t rows;
  int draws;
  int64_t units;  // columns or blocks
  bool* keep;     // [draws, rows, units], written
};

// The operations of one instruction set. Each returns false if scratch memory cannot be allocated.
struct Operations {
  bool (*row_stats)(const RowStatsArgs&);
  bool (*logit_stats)(const LogitStatsArgs&);
  bool (*delta_hash)(const DeltaHashArgs&);
  bool (*delta_sums)(const DeltaSumsArgs&);
  bool (*fisher_sums)(const FisherSumsArgs&);
  bool (*gram_norm)(const GramNormArgs&);
  bool (*head_grad_norm)(const HeadGradNormArgs&);
  bool (*mixture_stats)(const MixtureStatsArgs&);
  bool (*dropout_mask)(const DropoutMaskArgs&);
  bool (*hash_columns)(const HashColumnsArgs&);
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
