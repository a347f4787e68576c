// SPDX-License-Identifier: Apache-2.0
// The score loop for avx2; empty where the compiler has no such instruction set.
#if defined(__AVX2__)
#include "score.inc"

namespace ccq {
const Kernels* kernels_avx2() {
  static const Kernels k{"avx2", score};
  return &k;
}
}  // namespace ccq
#else
#include "search.h"

namespace ccq {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace ccq
#endif
