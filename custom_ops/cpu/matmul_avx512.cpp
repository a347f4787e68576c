// SPDX-License-Identifier: Apache-2.0
// The matrix product for avx512; empty where the compiler has no such instruction set.
#if defined(__AVX512BW__)
#include "matmul.inc"

namespace ccq {
const MatmulKernels* matmul_avx512() {
  static const MatmulKernels k{"avx512", multiply_block};
  return &k;
}
}  // namespace ccq
#else
#include "matmul.h"

namespace ccq {
const MatmulKernels* matmul_avx512() { return nullptr; }
}  // namespace ccq
#endif
