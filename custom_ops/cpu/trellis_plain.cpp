// SPDX-License-Identifier: Apache-2.0
// The inner loops of the search of ccq-2t in plain C++, for any processor.
#include "trellis.inc"

namespace ccq {
const TrellisKernels* trellis_plain() {
  static const TrellisKernels k{"plain", step, table, step_in_metric, add_four, add_tile};
  return &k;
}
}  // namespace ccq
