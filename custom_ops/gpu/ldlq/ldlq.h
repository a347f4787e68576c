// SPDX-License-Identifier: Apache-2.0
// The calibrated search on the GPU: the same words, scales, pairs and losses as custom_ops/cpu/ldlq.h, bit for bit.
//
// Channels do not depend on each other and every float operation is a single IEEE one in the CPU's order, so neither
// the distribution over threads nor the number of channels at a time can matter.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  CCQ_LDLQ_SCALES = 8,   // local scales tried side by side
  CCQ_LDLQ_PAIRS = 1024
};

struct ccq_ldlq_args {
  int64_t n, k;             // 64 | k
  // On the device the three large matrices are transposed, so that neighbouring threads read neighbouring floats.
  const float* weight;      // device [k, ccq_ldlq_stride(n)]: channel c is column c; host [n, k]
  const float* h;           // device [k, k]: row i holds column i of H; host H
  const float* feedback;    // device [k, k]: row i holds column i of the CPU's `feedback`; host as on the CPU
  const float* d_root;      // [k/4, 4, 4]
  const float* h_root;      // [k/4, 4, 4]
  const float* h_inverse;   // [k/4, 4, 4]
  const float* books;       // [pairs, 256, 4]: signed states of every byte
  const float* supers;      // [candidates, n]
  int pairs, candidates;
  float nominal;
  int low, high;            // window of local scales
  int keep_pairs, sweeps;
  int64_t run_bytes;        // memory for the runs in flight; fewer channels at a time where it is small
  uint16_t* words;          // [n, k/4]
  uint16_t* scales;         // [n, k/64]
  float* found_supers;      // [n]
  int32_t* found_pairs;     // [n]
  double* loss;             // [n]
  void* workspace;          // device, ccq_ldlq_workspace(args) bytes, 256-byte aligned
  cudaEvent_t screened;     // recorded after the choice of pairs, unless NULL
};

// Columns of the transposed weight: n, up to a multiple of 128.
int64_t ccq_ldlq_stride(int64_t n);

// Bytes; 0 where an argument is out of range, or run_bytes too small for the runs of one channel.
size_t ccq_ldlq_workspace(const struct ccq_ldlq_args* args);

// out[c, r] = in[r, c], row lengths as given.
cudaError_t ccq_ldlq_transpose(const float* in, int64_t rows, int64_t columns, int64_t in_stride, float* out,
                               int64_t out_stride, cudaStream_t stream);

// The two halves of the search, in this order and with the same arguments: error feedback, which does not read `h`,
// `h_root` and `h_inverse`, and coordinate descent with the outputs. Kernels on `stream`; they neither synchronize nor
// allocate. cudaErrorInvalidValue: a shape or count out of range.
cudaError_t ccq_ldlq_feed_back(const struct ccq_ldlq_args* args, cudaStream_t stream);
cudaError_t ccq_ldlq_descend(const struct ccq_ldlq_args* args, cudaStream_t stream);

// Both over host memory (workspace unused): uploads through page-locked buffers, of which `h` travels while the first
// half runs. Device and page-locked buffers stay for the next call, and grow to the largest. One call at a time, one
// device a process. Where the device has less than run_bytes free, half of it is tried, down to 16 MB.
// milliseconds (or NULL): upload, choice of pairs, error feedback, descent, outputs.
cudaError_t ccq_ldlq_host(const struct ccq_ldlq_args* args, float milliseconds[5]);

// Device bytes that ccq_ldlq_host holds at the moment.
size_t ccq_ldlq_held_bytes(void);

#ifdef __cplusplus
}
#endif
