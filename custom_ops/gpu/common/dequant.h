// SPDX-License-Identifier: Apache-2.0
// Stored tensors (checkpoint layout) to a matrix of floats, bit for bit codec.formats.dequantize.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum ccq_format { CCQ_WINT2 = 0, CCQ_CCQ25 = 1, CCQ_CCQ275 = 2 };
// The runtime whose rounding is reproduced, and the type of the output.
enum ccq_runtime { CCQ_RUNTIME_BF16 = 0, CCQ_RUNTIME_FP16 = 1, CCQ_RUNTIME_FP32 = 2 };

struct ccq_dequant_args {
  int format, runtime;
  int64_t k, n;              // 128 | k (WINT2) or 64 | k; any n
  const void* quant_weight;  // device, as stored
  const uint8_t* weight_scale;  // WINT2 only, as the next two ...
  const uint16_t* super_scales; // bfloat16 bits [n]
  const float* code_scale;
  const float* code_zp;
  void* out;                 // device [k, n]
};

// One kernel on `stream`; never synchronizes or allocates. cudaErrorInvalidValue: a shape or enum out of range.
cudaError_t ccq_dequant(const struct ccq_dequant_args* args, cudaStream_t stream);

// All pointers of `args` are host memory here: copies, decodes, copies back.
cudaError_t ccq_dequant_host(const struct ccq_dequant_args* args);

#ifdef __cplusplus
}
#endif
