// SPDX-License-Identifier: Apache-2.0
// Products with matrices of 2.5 and 2.75 bits as they are stored: one matrix, or grouped over experts. Made for few
// rows; correct for any number.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "../common/dequant.h"
#include "moe_gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ccq_spare_gemm_args {
  const void* x;             // [rows, k] of `dtype`, rows sorted by expert
  const int64_t* offsets;    // device [experts]: inclusive prefix sums of rows per expert; NULL: one expert takes all
  const void* quant_weight;  // [experts, k/64 * words, n] as stored: 10 uint16 a group (2.5 bits) or 22 uint8 (2.75)
  const uint16_t* super_scales;  // bfloat16 bits [experts, n]
  const float* row_scale;    // device [rows] float32, multiplied into the fp32 result; NULL: 1
  void* out;                 // [rows, n] of `dtype`; each row below offsets[experts-1] is written, others are untouched
  int rows, k, n, experts;   // rows may be 0; 64 | k, 4 | n, 1 <= experts <= 1024; quant_weight 8-byte aligned
  int format;                // CCQ_CCQ25 or CCQ_CCQ275
  int dtype;                 // enum ccq_dtype, of x and out
  int row_order;             // enum ccq_row_order
};

// One kernel on `stream`, float32 sums in a fixed order: a row's bits depend on that row, the weights and nothing else.
// Never synchronizes or allocates. cudaErrorInvalidValue: a shape or enum out of range.
cudaError_t ccq_spare_gemm(const struct ccq_spare_gemm_args* args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
