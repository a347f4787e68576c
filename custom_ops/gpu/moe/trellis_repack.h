// SPDX-License-Identifier: Apache-2.0
// Checkpoint layout of CCQ-2T <-> the layout that its products on the GPU read. Exact in both directions.
#pragma once

#include "repack.h"

#ifdef __cplusplus
extern "C" {
#endif

// The kernels' layout, E experts, K input rows, N output columns, K % 128 == 0, N % 16 == 0:
//   units    uint8, [E, ceil(N/64), K/128, 2176]: 64 columns x 128 rows. First, of each of four 16-column tiles, 512 bytes: of two
//            groups, 16 columns, the 16 code bytes. Then of each tile 8 words of 32 bits: for g in 0..7 four nibbles of local
//            scales, (g, group 0), (g, group 1), (g + 8, group 0), (g + 8, group 1), lowest bits first; in bits 16 to 23 the code
//            byte before the unit's in column g, in bits 24 to 31 the same of column g + 8.
//   columns  float32 [E, ceil(N/64) * 64]: super scales. Columns that are not there are 0 in both.
// Both need 16-byte alignment.
size_t ccq_trellis_units_bytes(int experts, int k, int n);
size_t ccq_trellis_columns_bytes(int experts, int n);

// Inputs: stacked checkpoint tensors quant_weight u8 [E, K/4, N], weight_scale u8 [E, K/128, N], super_scales [E, N] of
// `super_dtype`. `before` u8 [E, N]: the code bytes before the first ones, where the rows are a part of a column's that does not
// begin it; NULL: 0, as at a column's beginning. No synchronization, no allocation. Source and destination must not overlap.
cudaError_t ccq_repack_trellis(const uint8_t* quant_weight, const uint8_t* weight_scale, const void* super_scales, int super_dtype,
                               const uint8_t* before, int experts, int k, int n, uint8_t* units, float* columns,
                               cudaStream_t stream);

// The inverse, bit for bit (super_dtype must be the one given to ccq_repack_trellis).
cudaError_t ccq_unpack_trellis(const uint8_t* units, const float* columns, int experts, int k, int n, uint8_t* quant_weight,
                               uint8_t* weight_scale, void* super_scales, int super_dtype, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
