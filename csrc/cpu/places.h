// Adds values to hashed places of a row. A place is encoded as in DeltaHashArgs: p, or its complement ~p for a minus sign.
#pragma once
#include "load.h"

namespace acqcore::ACQCORE_ISA {

// Adds each value to its place in `out`, or subtracts it.
inline void add_places(const int32_t* places /* [width] */, const float* values /* [width] */, int64_t width,
                       float* out) {
  for (int64_t v = 0; v < width; ++v) {
    const int32_t negative = places[v] >> 31;  // 0 or all ones
    uint32_t bits;
    memcpy(&bits, values + v, 4);
    out[places[v] ^ negative] += from_bits(bits ^ (uint32_t(negative) & 0x80000000u));
  }
}

// The same for places of which most follow each other, as those of rotated_places do.
inline void add_rotated(const int32_t* places /* [width] */, const float* values /* [width] */, int64_t width,
                        float* out) {
  int64_t v = 0;
  for (; v + kLanes <= width; v += kLanes) {
    const int32_t first = places[v] ^ (places[v] >> 31), last = places[v + kLanes - 1] ^ (places[v + kLanes - 1] >> 31);
    if (last - first != kLanes - 1) {  // places start over in between
      add_places(places + v, values + v, kLanes, out);
      continue;
    }
    UintVec signs;
    memcpy(&signs, places + v, sizeof signs);
    const Vec signed_values = (Vec)((UintVec)load(values + v) ^ (signs & 0x80000000u));
    store(out + first, load(out + first) + signed_values);
  }
  add_places(places + v, values + v, width - v, out);
}

}  // namespace acqcore::ACQCORE_ISA
