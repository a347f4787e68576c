// SPDX-License-Identifier: Apache-2.0
// One position of the search of ccq-2t for avx512; empty where the compiler has no such instruction set.
#if defined(__AVX512BW__)
#include "trellis.inc"

namespace ccq {
const TrellisKernels* trellis_avx512() {
  static const TrellisKernels k{"avx512", step};
  return &k;
}
}  // namespace ccq
#else
#include "trellis.h"

namespace ccq {
const TrellisKernels* trellis_avx512() { return nullptr; }
}  // namespace ccq
#endif
