// SPDX-License-Identifier: Apache-2.0
// The inner loops of the search of ccq-2t for avx512vnni; empty where the compiler has no such instruction set.
#if defined(__AVX512VNNI__)
#include "trellis.inc"

namespace ccq {
const TrellisKernels* trellis_avx512vnni() {
  static const TrellisKernels k{"avx512vnni", step, table, step_in_metric, add_four, add_tile};
  return &k;
}
}  // namespace ccq
#else
#include "trellis.h"

namespace ccq {
const TrellisKernels* trellis_avx512vnni() { return nullptr; }
}  // namespace ccq
#endif
