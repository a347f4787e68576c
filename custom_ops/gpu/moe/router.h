// SPDX-License-Identifier: Apache-2.0
// A router's product in float32 for few rows: scores of experts from bfloat16 activations.
#pragma once

#include <cuda_runtime.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CCQ_ROUTER_MAX_ROWS 64

struct ccq_router_args {
  const void* x;       // bfloat16 [rows, k], 16-byte aligned
  const void* weight;  // bfloat16 [3, experts, k], 16-byte aligned: the float32 weight is the sum of its three parts
  float* out;          // [rows, experts]
  int rows, k, experts;  // 0 <= rows <= CCQ_ROUTER_MAX_ROWS; 64 | k, 16 | experts
};

// out = x @ weight^T: exact products, float32 sums in an order that depends on k alone. One kernel on `stream`; never
// synchronizes or allocates; may be captured into a CUDA graph. cudaErrorInvalidValue: a size out of range or a pointer that is
// NULL. cudaErrorNotSupported: before compute capability 9.0.
cudaError_t ccq_router(const struct ccq_router_args* args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
