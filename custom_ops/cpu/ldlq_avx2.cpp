// SPDX-License-Identifier: Apache-2.0
// The calibrated search for avx2; empty where the compiler has no such instruction set.
#if defined(__AVX2__)
#include "ldlq.inc"

namespace ccq {
const LdlqKernels* ldlq_avx2() {
  static const LdlqKernels k{"avx2", feed_back, descend};
  return &k;
}
}  // namespace ccq
#else
#include "ldlq.h"

namespace ccq {
const LdlqKernels* ldlq_avx2() { return nullptr; }
}  // namespace ccq
#endif
