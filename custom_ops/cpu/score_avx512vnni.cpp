// SPDX-License-Identifier: Apache-2.0
// The score loop for avx512vnni; empty where the compiler has no such instruction set.
#if defined(__AVX512VNNI__)
#include "score.inc"

namespace ccq {
const Kernels* kernels_avx512vnni() {
  static const Kernels k{"avx512vnni", score};
  return &k;
}
}  // namespace ccq
#else
#include "search.h"

namespace ccq {
const Kernels* kernels_avx512vnni() { return nullptr; }
}  // namespace ccq
#endif
