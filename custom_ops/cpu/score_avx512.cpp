// SPDX-License-Identifier: Apache-2.0
// The score loop for avx512; empty where the compiler has no such instruction set.
#if defined(__AVX512BW__)
#include "score.inc"

namespace ccq {
const Kernels* kernels_avx512() {
  static const Kernels k{"avx512", score};
  return &k;
}
}  // namespace ccq
#else
#include "search.h"

namespace ccq {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace ccq
#endif
