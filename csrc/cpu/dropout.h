// Dropout on hidden states, applied to packed panels. Masks are recomputed from their counters, never stored.
#pragma once
#include "../philox.h"
#include "isa.h"
#include "product.h"

namespace acqcore::ACQCORE_ISA {

constexpr int kCounters = 16;  // evaluated together, so that the compiler vectorizes them

// keep[0, n): whether units [0, n) of a row survive draw `draw` at `site`; a unit is a column or a block of columns.
inline void keep_units(const Dropout& dropout, int64_t row, int draw, int site, int64_t n, bool* keep) {
  const uint32_t position = static_cast<uint32_t>(dropout.positions[row]);
  const uint32_t sample = static_cast<uint32_t>(dropout.samples[row]);
  for (int64_t begin = 0; begin < n; begin += 4 * kCounters) {
    uint32_t words[kCounters][4];
    const uint32_t group = static_cast<uint32_t>(begin / 4);
#pragma GCC ivdep
    for (int i = 0; i < kCounters; ++i) {
      mask_words(dropout.seed, group + i, position, sample, static_cast<uint32_t>(draw), static_cast<uint32_t>(site),
                 words[i]);
    }
    const int64_t count = n - begin < 4 * kCounters ? n - begin : 4 * kCounters;
    for (int64_t u = 0; u < count; ++u) keep[begin + u] = words[u / 4][u % 4] >= dropout.threshold;
  }
}

// Applies a mask, one entry per column, to one row of a panel; dropped columns become 0.
inline void mask_row(const float* panel /* `units` deep */, int row, const bool* keep, int64_t units, bool pairs,
                     float* out /* `units` deep */) {
  for (int64_t u = 0; u < units; ++u) {
    const int64_t place = panel_place(u, row);
    uint32_t bits;
    memcpy(&bits, panel + place, 4);
    const uint32_t mask = pairs ? (keep[2 * u] ? 0xffffu : 0u) | (keep[2 * u + 1] ? 0xffff0000u : 0u)
                                : (keep[u] ? ~0u : 0u);
    bits &= mask;
    memcpy(out + place, &bits, 4);
  }
}

}  // namespace acqcore::ACQCORE_ISA
