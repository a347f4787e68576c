// SPDX-License-Identifier: Apache-2.0
// One position of the search of ccq-2t for avx2; empty where the compiler has no such instruction set.
#if defined(__AVX2__)
#include "trellis.inc"

namespace ccq {
const TrellisKernels* trellis_avx2() {
  static const TrellisKernels k{"avx2", step};
  return &k;
}
}  // namespace ccq
#else
#include "trellis.h"

namespace ccq {
const TrellisKernels* trellis_avx2() { return nullptr; }
}  // namespace ccq
#endif
