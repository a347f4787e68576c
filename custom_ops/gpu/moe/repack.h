// SPDX-License-Identifier: Apache-2.0
// Checkpoint layout of WINT2 <-> the layout the grouped GEMM reads. Exact in both directions.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __CUDACC__
// Number of the unit of 16-column tile `tile` and 128-row block `kb`: groups of four tiles interleave along K.
static __host__ __device__ inline size_t ccq_unit_index(size_t expert, int tile, int kb, int tiles, int blocks_k) {
  int first = tile / 4 * 4, count = tiles - first < 4 ? tiles - first : 4;
  return (expert * tiles + first) * blocks_k + (size_t)kb * count + (tile - first);
}
#endif

// Types of 16-bit floats at this interface.
enum ccq_dtype { CCQ_BF16 = 0, CCQ_FP16 = 1 };

// What repacking found out about a tensor's (code_scale, code_zp) pairs.
//   CCQ_PAIRS_INTEGER: every pair integer and every one of its 256 codes inside [0, 32767].
//   CCQ_PAIRS_GENERAL: anything else; decoded with FastDeploy's float32 rounding.
//   CCQ_PAIRS_TRELLIS: CCQ-2T, a code without pairs, as trellis_repack.h lays it out.
enum ccq_pairs { CCQ_PAIRS_INTEGER = 0, CCQ_PAIRS_GENERAL = 1, CCQ_PAIRS_TRELLIS = 2 };

// The kernel's layout, all row-major, E experts, K input rows, N output columns, K % 128 == 0, N % 16 == 0:
//   quant   uint8  E*N*K/4 bytes: units of 512 (16 columns x 128 rows), [E, N/64, K/128, up to 4, 512]
//   scales  uint8  E*N*K/128 bytes: units of 16, in the same order
//   columns uint32 [2, E, N/16, 32], E*N*16 bytes: what each column has once. Two planes, so that kernels for integer pairs
//           fetch only the first. In a tile of 16 columns, g = 0..7, columns g and g + 8 side by side:
//             plane 0: [g][2] integer pair (code_scale, low half, two's complement; code_zp, high half; 0 if the pair is
//                      not integer), then [g][2] super scale as float32 bits
//             plane 1: [g][2][2] float32 bits of code_scale and code_zp
// All three need 16-byte alignment. Row order (plain or FastDeploy's) is untouched by repacking: the GEMM is told.

// Inputs: stacked checkpoint tensors quant_weight u8 [E, K/4, N], weight_scale u8 [E, K/128, N], super_scales [E, N] of
// `super_dtype`, code_scale and code_zp float32 [E, N].
// pair_kind: one int32 on the device; receives an enum ccq_pairs for the whole tensor. Read it once, at load.
// No synchronization, no allocation. Source and destination must not overlap.
cudaError_t ccq_repack_wint2(const uint8_t* quant_weight, const uint8_t* weight_scale, const void* super_scales,
                             int super_dtype, const float* code_scale, const float* code_zp, int experts, int k, int n,
                             uint8_t* quant, uint8_t* scales, uint32_t* columns, int32_t* pair_kind,
                             cudaStream_t stream);

// The inverse, bit for bit (super_dtype must be the one given to ccq_repack_wint2).
cudaError_t ccq_unpack_wint2(const uint8_t* quant, const uint8_t* scales, const uint32_t* columns, int experts, int k,
                             int n, uint8_t* quant_weight, uint8_t* weight_scale, void* super_scales, int super_dtype,
                             float* code_scale, float* code_zp, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
