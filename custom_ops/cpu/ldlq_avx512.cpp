// SPDX-License-Identifier: Apache-2.0
// The calibrated search for avx512; empty where the compiler has no such instruction set.
#if defined(__AVX512BW__)
#include "ldlq.inc"

namespace ccq {
const LdlqKernels* ldlq_avx512() {
  static const LdlqKernels k{"avx512", feed_back, descend};
  return &k;
}
}  // namespace ccq
#else
#include "ldlq.h"

namespace ccq {
const LdlqKernels* ldlq_avx512() { return nullptr; }
}  // namespace ccq
#endif
