// SPDX-License-Identifier: Apache-2.0
// SwiGLU between the two products of an expert.
#pragma once

#include <cuda_runtime.h>

#ifdef __cplusplus
extern "C" {
#endif

// out[r, i] = silu(x[r, i]) * x[r, width + i], in float32, rounded once. x [rows, 2 * width], out [rows, width] of
// `dtype` (enum ccq_dtype), 16-byte aligned; 8 | width. One kernel; cudaErrorInvalidValue: a size or enum out of range.
cudaError_t ccq_swiglu(const void* x, void* out, int rows, int width, int dtype, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
