// SPDX-License-Identifier: Apache-2.0
// Float products for avx512; empty where the compiler has no such instruction set.
#if defined(__AVX512BW__)
#include "floats.inc"

namespace ccq {
const FloatKernels* floats_avx512() {
  static const FloatKernels k{"avx512", decode, accumulate, attend_queries};
  return &k;
}
}  // namespace ccq
#else
#include "floats.h"

namespace ccq {
const FloatKernels* floats_avx512() { return nullptr; }
}  // namespace ccq
#endif
