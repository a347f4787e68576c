// SPDX-License-Identifier: Apache-2.0
// One position of the search of ccq-2t in plain C++, for any processor.
#include "trellis.inc"

namespace ccq {
const TrellisKernels* trellis_plain() {
  static const TrellisKernels k{"plain", step};
  return &k;
}
}  // namespace ccq
