// SPDX-License-Identifier: Apache-2.0
// Float products in plain C++, for any processor.
#include "floats.inc"

namespace ccq {
const FloatKernels* floats_plain() {
  static const FloatKernels k{"plain", decode, accumulate, attend_queries};
  return &k;
}
}  // namespace ccq
