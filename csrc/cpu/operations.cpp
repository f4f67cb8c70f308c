// Operation table of this instruction set.
#include "gram.h"
#include "isa.h"

namespace acqcore {
#if defined(__AMX_BF16__)
namespace v4_bf16 {
extern const Operations kOperations;
}
#endif

namespace ACQCORE_ISA {

bool row_stats(const RowStatsArgs& args);            // row_stats.cpp
bool logit_stats(const LogitStatsArgs& args);        // logit_stats.cpp
bool delta_hash(const DeltaHashArgs& args);          // hash.cpp
bool hash_columns(const HashColumnsArgs& args);      // hash.cpp
bool delta_sums(const DeltaSumsArgs& args);          // delta_sums.cpp
bool fisher_sums(const FisherSumsArgs& args);        // fisher_sums.cpp
bool gram_norm(const GramNormArgs& args);            // gram_norm.cpp
bool head_grad_norm(const HeadGradNormArgs& args);   // head_grad_norm.cpp
bool mixture_stats(const MixtureStatsArgs& args);    // mixture_stats.cpp
bool dropout_mask(const DropoutMaskArgs& args);      // mixture_stats.cpp

extern const Operations kOperations;

#if defined(__AMX_BF16__)

namespace {

// Tile registers multiply whole tiles of bfloat16; everything else runs on the best vector instruction set.
bool multiplies(const HeadArgs& head) {
  return head.hidden.dtype == DType::kBFloat16 && head.weight.dtype == DType::kBFloat16;
}

template <typename Args>
bool multiplies(const Args& args) {
  return multiplies(args.head);
}

// For any dtype of the product, Grams of long samples are computed from factors split into bfloat16.
bool multiplies(const GramArgs& gram) {
  for (int64_t s = 0; s < gram.samples; ++s) {
    if (GramLayout(gram.bounds[2 * s + 1] - gram.bounds[2 * s], false).tiled()) return true;
  }
  return false;
}

bool multiplies(const RowStatsArgs& args) { return multiplies(args.gram) || multiplies(args.head); }

// Factors that multiply values are split into bfloat16 too.
bool multiplies(const DeltaSumsArgs& args) { return args.values || multiplies(args.gram) || multiplies(args.head); }
bool multiplies(const FisherSumsArgs&) { return true; }

bool multiplies(const MixtureStatsArgs& args) {
  const bool whole = args.dropout.form != Draws::kBlock || args.dropout.block % (2 * kTileUnits) == 0;
  return whole && (multiplies(args.gram) || multiplies(args.head));
}

template <typename Args, bool (*own)(const Args&), bool (*Operations::*vectors)(const Args&)>
bool by_dtype(const Args& args) {
  return multiplies(args) ? own(args) : (v4_bf16::kOperations.*vectors)(args);
}

}  // namespace

const Operations kOperations = {by_dtype<RowStatsArgs, row_stats, &Operations::row_stats>,
                                logit_stats,
                                by_dtype<DeltaHashArgs, delta_hash, &Operations::delta_hash>,
                                by_dtype<DeltaSumsArgs, delta_sums, &Operations::delta_sums>,
                                by_dtype<FisherSumsArgs, fisher_sums, &Operations::fisher_sums>,
                                by_dtype<GramNormArgs, gram_norm, &Operations::gram_norm>,
                                by_dtype<HeadGradNormArgs, head_grad_norm, &Operations::head_grad_norm>,
                                by_dtype<MixtureStatsArgs, mixture_stats, &Operations::mixture_stats>,
                                dropout_mask,
                                hash_columns};

#else

const Operations kOperations = {row_stats, logit_stats,    delta_hash,    delta_sums,   fisher_sums,
                                gram_norm, head_grad_norm, mixture_stats, dropout_mask, hash_columns};

#endif

}  // namespace ACQCORE_ISA
}  // namespace acqcore
