// SPDX-License-Identifier: Apache-2.0
// The matrix product in plain C++, for any processor.
#include "matmul.inc"

namespace ccq {
const MatmulKernels* matmul_plain() {
  static const MatmulKernels k{"plain", multiply_block};
  return &k;
}
}  // namespace ccq
