// SPDX-License-Identifier: Apache-2.0
// The inner loops of the search of ccq-2t for avx2; empty where the compiler has no such instruction set.
#if defined(__AVX2__)
#include "trellis.inc"

namespace ccq {
const TrellisKernels* trellis_avx2() {
  static const TrellisKernels k{"avx2", step, table, step_in_metric, add_four, add_tile};
  return &k;
}
}  // namespace ccq
#else
#include "trellis.h"

namespace ccq {
const TrellisKernels* trellis_avx2() { return nullptr; }
}  // namespace ccq
#endif
