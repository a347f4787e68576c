// SPDX-License-Identifier: Apache-2.0
// The matrix product for avx512vnni; empty where the compiler has no such instruction set.
#if defined(__AVX512VNNI__)
#include "matmul.inc"

namespace ccq {
const MatmulKernels* matmul_avx512vnni() {
  static const MatmulKernels k{"avx512vnni", multiply_block};
  return &k;
}
}  // namespace ccq
#else
#include "matmul.h"

namespace ccq {
const MatmulKernels* matmul_avx512vnni() { return nullptr; }
}  // namespace ccq
#endif
