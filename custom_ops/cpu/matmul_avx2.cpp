// SPDX-License-Identifier: Apache-2.0
// The matrix product for avx2; empty where the compiler has no such instruction set.
#if defined(__AVX2__)
#include "matmul.inc"

namespace ccq {
const MatmulKernels* matmul_avx2() {
  static const MatmulKernels k{"avx2", multiply_block};
  return &k;
}
}  // namespace ccq
#else
#include "matmul.h"

namespace ccq {
const MatmulKernels* matmul_avx2() { return nullptr; }
}  // namespace ccq
#endif
