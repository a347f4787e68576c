// SPDX-License-Identifier: Apache-2.0
// The calibrated ccq-2t encoder once more, with blocks of 16 columns: 64 KB of shared memory, where those of 32 take 113 KB.
#define CCQ_TRELLIS_NARROW
#define CCQ_TRELLIS_COLUMNS 16
#define ccq_calibrated_trellis ccq_narrow_trellis
#include "trellis_ldlq.cu"
