// SPDX-License-Identifier: Apache-2.0
// The calibrated encoder of ccq-2t on the GPU: the bytes, scales and losses of custom_ops/cpu/trellis_ldlq.h, bit for bit.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { CCQ_TRELLIS_WINDOW = 68 };  // rows of a group and of the byte behind it

// Factors of a Hessian or of a window's block of it (paddle_ccq/encoder/trellis_metric.py); TrellisFactors of the CPU.
struct ccq_trellis_factors {
  const float* m;       // [rows, rows]
  const float* root;    // [rows/4, 4, 4]
  const float* unit;    // [rows/4]
  const float* ratio;   // [rows/4]
  const float* spread;  // [rows/4]
};

struct ccq_trellis_ldlq_args {
  int64_t n, k;                        // 64 | k
  const float* weight;                 // device [n, k], of about unit rms
  const float* supers;                 // device [candidates, n]
  int candidates;
  const float* h;                      // device [k, k]
  struct ccq_trellis_factors all;      // of h
  struct ccq_trellis_factors windows;  // of every group's window, one behind the other, each of CCQ_TRELLIS_WINDOW rows
  const float* inverse;                // device [k/64, CCQ_TRELLIS_WINDOW, CCQ_TRELLIS_WINDOW]
  // TrellisLdlqRecipe of the CPU.
  double nominal;
  int window_low, window_high, beam, sweeps;
  uint8_t* words;                      // device [n, k/4]
  uint8_t* scales;                     // device [n, k/64]
  float* found_supers;                 // device [n]
  double* loss;                        // device [n]
  void* workspace;                     // ccq_trellis_ldlq_workspace(args) bytes, 256-byte aligned
};

// Depends on the device in use. 0: a shape or count out of range.
size_t ccq_trellis_ldlq_workspace(const struct ccq_trellis_ldlq_args* args);

// Kernels on `stream`; never synchronizes or allocates.
// cudaErrorInvalidValue: where the workspace would be 0.
cudaError_t ccq_trellis_ldlq(const struct ccq_trellis_ldlq_args* args, cudaStream_t stream);

// All pointers of `args` are host memory here (workspace unused): copies, encodes, copies back. One call at a time;
// device buffers stay for the next one. kernel_milliseconds: NULL, or the time of the kernels.
cudaError_t ccq_trellis_ldlq_host(const struct ccq_trellis_ldlq_args* args, float* kernel_milliseconds);

// Device memory that ccq_trellis_ldlq_host keeps.
size_t ccq_trellis_ldlq_held_bytes(void);

#ifdef __cplusplus
}
#endif
