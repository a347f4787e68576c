// SPDX-License-Identifier: Apache-2.0
// Float products for avx2; empty where the compiler has no such instruction set.
#if defined(__AVX2__)
#include "floats.inc"

namespace ccq {
const FloatKernels* floats_avx2() {
  static const FloatKernels k{"avx2", decode, accumulate, attend_queries};
  return &k;
}
}  // namespace ccq
#else
#include "floats.h"

namespace ccq {
const FloatKernels* floats_avx2() { return nullptr; }
}  // namespace ccq
#endif
