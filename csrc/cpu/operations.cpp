// This instruction set's table.
#include "isa.h"

namespace acqcore::ACQCORE_ISA {

bool row_stats(const RowStatsArgs& args);            // row_stats.cpp
bool logit_stats(const LogitStatsArgs& args);        // logit_stats.cpp
bool delta_product(const DeltaProductArgs& args);    // delta_product.cpp
bool hidden_grad(const HiddenGradArgs& args);        // hidden_grad.cpp
bool fisher_sums(const FisherSumsArgs& args);        // fisher_sums.cpp
bool gram_norm(const GramNormArgs& args);            // gram_norm.cpp
bool head_grad_norm(const HeadGradNormArgs& args);   // head_grad_norm.cpp
bool mixture_stats(const MixtureStatsArgs& args);    // mixture_stats.cpp
bool dropout_mask(const DropoutMaskArgs& args);      // mixture_stats.cpp

extern const Operations kOperations;
const Operations kOperations = {row_stats, logit_stats,    delta_product, hidden_grad, fisher_sums,
                                gram_norm, head_grad_norm, mixture_stats, dropout_mask};

}  // namespace acqcore::ACQCORE_ISA
