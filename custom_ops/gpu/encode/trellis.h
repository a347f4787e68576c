// SPDX-License-Identifier: Apache-2.0
// The data-free encoder of ccq-2t on the GPU: the bytes, scales and sums of custom_ops/cpu/trellis.h, bit for bit.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  CCQ_TRELLIS_KAPPAS = 8,
  CCQ_TRELLIS_TRIES = 15,     // local scales of a window
  CCQ_TRELLIS_BEAM = 65534,   // the largest beam: costs inside it are kept in 16 bits
};

struct ccq_trellis_args {
  const float* weight;        // device [n, k], 64 | k, finite, 16-byte aligned
  int64_t n, k;
  // TrellisRecipe of paddle_ccq/encoder/recipes.py.
  double nominal;
  double kappas[CCQ_TRELLIS_KAPPAS];
  int kappa_count;
  int window_low, window_high;
  int beam;
  // The most device memory for survivors' costs, which the traceback needs. It limits the channels in flight, and
  // with them the speed; the result is the same.
  int64_t run_bytes;
  uint8_t* words;             // device [n, k/4]
  uint8_t* scales;            // device [n, k/64]
  float* supers;              // device [n]
  double* sums;               // device [n, 3]: sum w^2, sum w*w', sum w'^2
  void* workspace;            // ccq_trellis_workspace(args) bytes, 256-byte aligned
};

// Depends on the device in use. 0: a shape or count out of range, or run_bytes too small for one block of channels.
size_t ccq_trellis_workspace(const struct ccq_trellis_args* args);

// Kernels on `stream`; never synchronizes or allocates.
// cudaErrorInvalidValue: where the workspace would be 0.
cudaError_t ccq_trellis(const struct ccq_trellis_args* args, cudaStream_t stream);

// All pointers of `args` are host memory here (workspace unused): copies, encodes, copies back. One call at a time;
// device buffers stay for the next one. run_bytes is halved as long as the device has not so much memory.
// kernel_milliseconds: NULL, or the time of the kernels.
cudaError_t ccq_trellis_host(const struct ccq_trellis_args* args, float* kernel_milliseconds);

// Device memory that ccq_trellis_host keeps.
size_t ccq_trellis_held_bytes(void);

#ifdef __cplusplus
}
#endif
