// SPDX-License-Identifier: Apache-2.0
// Products of few rows of each expert with 4-bit integer weights, one scale a column.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ccq_w4_gemm_args {
  const void* x;           // bfloat16 [rows, k], sorted by expert, 16-byte aligned
  const int64_t* offsets;  // [experts]: where each expert's rows end
  const void* weight;      // uint8 [experts, n, k/2], 16-byte aligned: state plus 8 of row 2i in the lower half of byte i
  const void* scale;       // bfloat16 [experts, n, scale_stride]; the first of each
  void* out;               // bfloat16 [rows, n]; rows behind the last expert's are left alone
  int rows, k, n, experts, scale_stride;  // 64 | k, 16 | n, experts <= 1024
  int tokens;              // no expert has more rows; chooses the kernel, any value is right
};

// out = (x @ states) * scale of each row's expert: float32 sums, rounded once. One kernel on `stream`; never synchronizes or
// allocates; may be captured into a CUDA graph. Weights are read once for every 4 or 8 rows of an expert.
// cudaErrorInvalidValue: a size out of range or a pointer that is NULL. cudaErrorNotSupported: too long a k for this GPU.
cudaError_t ccq_w4_gemm(const struct ccq_w4_gemm_args* args, cudaStream_t stream);

// One expert's weights as bfloat16 [n, k], states times scales rounded once, for a product of many rows: the same weight [n, k/2]
// and scale [n, scale_stride], 32 | k, 16-byte aligned. One kernel on `stream`.
// cudaErrorInvalidValue: a size out of range or a pointer that is NULL.
cudaError_t ccq_dequant_w4(const void* weight, const void* scale, int scale_stride, int k, int n, void* out,
                           cudaStream_t stream);

#ifdef __cplusplus
}
#endif
