// SPDX-License-Identifier: Apache-2.0
// Products with 8-bit integer weights, one scale a column, for up to 64 rows of bfloat16; and decoding them for more rows.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CCQ_LINEAR_W8_MAX_ROWS 64

// The weight's layout: states plus 128 as uint8, in units of 16 columns x 64 rows of the matrix [k, n], [n/16, k/64, 1024].
// In a unit, byte ((h * 8 + g) * 4 + t) * 16 + i is column 8 h + g, row 16 t + i (h < 2, g < 8, t < 4, i < 16): what lane
// 4 g + t of a warp wants for the tensor core's A fragments, in two 16-byte pieces.

struct ccq_linear_w8_args {
  const void* x;        // bfloat16 [rows, k], 16-byte aligned
  const void* weight;   // uint8 [n/16, k/64, 1024], 16-byte aligned
  const void* scale;    // bfloat16 [n]
  void* out;            // bfloat16 [rows, n]
  void* workspace;      // ccq_linear_w8_workspace(...) bytes, 16-byte aligned; contents need not be initialized
  int32_t* counters;    // ccq_linear_w8_counters(n) integers, zero before the first call; each call leaves them zero
  int rows, k, n;       // 0 <= rows <= CCQ_LINEAR_W8_MAX_ROWS; 64 | k, 16 | n
};

size_t ccq_linear_w8_workspace(int rows, int k, int n);
int ccq_linear_w8_counters(int n);

// out = (x @ states) * scale: float32 sums in an order that depends on the shape and the GPU model alone, rounded once.
// One kernel on `stream`; never synchronizes or allocates; may be captured into a CUDA graph. Calls that may run at the same
// time need workspaces and counters of their own. cudaErrorInvalidValue: a size out of range or a pointer that is NULL.
cudaError_t ccq_linear_w8(const struct ccq_linear_w8_args* args, cudaStream_t stream);

// out bfloat16 [count, k] = columns first..first+count-1 times their scales, rounded; 16 | first, 16 | count. The same weight.
cudaError_t ccq_dequant_w8(const void* weight, const void* scale, int k, int first, int count, void* out,
                           cudaStream_t stream);

#ifdef __cplusplus
}
#endif
