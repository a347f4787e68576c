// SPDX-License-Identifier: Apache-2.0
// The calibrated search in plain C++, for any processor.
#include "ldlq.inc"

namespace ccq {
const LdlqKernels* ldlq_plain() {
  static const LdlqKernels k{"plain", feed_back, descend};
  return &k;
}
}  // namespace ccq
