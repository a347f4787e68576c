// SPDX-License-Identifier: Apache-2.0
// The score loop in plain C++, for any processor.
#include "score.inc"

namespace ccq {
const Kernels* kernels_plain() {
  static const Kernels k{"plain", score};
  return &k;
}
}  // namespace ccq
