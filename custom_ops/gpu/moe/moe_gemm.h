// SPDX-License-Identifier: Apache-2.0
// Grouped GEMM over experts with WINT2 or CCQ-2T weights: out[r, :] = x[r, :] W[expert(r)] (* row_scale[r]).
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include "repack.h"

#ifdef __cplusplus
extern "C" {
#endif

// The order of a 64-group's input rows in the checkpoint (paddle_ccq/codec/row_order.py). The activations are permuted
// to match, so that both orders cost the same.
enum ccq_row_order { CCQ_ROWS_PLAIN = 0, CCQ_ROWS_FASTDEPLOY = 1 };

struct ccq_moe_gemm_args {
  const void* x;             // [rows, k] of `dtype`, rows sorted by expert, 16-byte aligned
  const int64_t* offsets;    // device [experts]: inclusive prefix sums of rows per expert; NULL: one expert takes all
  const uint8_t* quant;      // from ccq_repack_wint2; CCQ-2T: units from ccq_repack_trellis
  const uint8_t* scales;     //   "                    CCQ-2T: not read
  const uint32_t* columns;   //   "                    CCQ-2T: columns from ccq_repack_trellis
  const float* row_scale;    // device [rows] float32, multiplied into the fp32 result; NULL: 1
  void* out;                 // [rows, n] of `dtype`; 16-byte aligned; rows below offsets[experts-1] are written, others untouched
  void* workspace;           // ccq_moe_gemm_workspace(...) bytes, 256-byte aligned; contents need not be initialized
  int rows, k, n, experts;   // rows may be 0; k % 128 == 0; n % 16 == 0; 1 <= experts <= 1024
  int dtype;                 // enum ccq_dtype, of x and out
  int pairs;                 // enum ccq_pairs, as ccq_repack_wint2 reported (CCQ_PAIRS_GENERAL is always correct for WINT2)
  int row_order;             // enum ccq_row_order; CCQ-2T: CCQ_ROWS_PLAIN
};

// Bytes of workspace. Monotonic in rows: a buffer for the largest row count serves all smaller ones. One buffer must not
// be used by two calls that may run at the same time (two streams); calls in one stream may share it.
size_t ccq_moe_gemm_workspace(int rows, int k, int n, int experts);

// Launches one or two kernels on `stream`; never synchronizes or allocates; may be captured into a CUDA graph.
// The result depends on the inputs and on the GPU model alone: same inputs, same bits.
// cudaErrorInvalidValue: a shape, dtype or enum out of range, or a required pointer that is NULL. cudaErrorInvalidConfiguration:
// CCQ-2T with more input rows than the GPU's shared memory takes (before Hopper; 6,000 and more fit everywhere).
cudaError_t ccq_moe_gemm(const struct ccq_moe_gemm_args* args, cudaStream_t stream);

// Which kernel serves a call, for tests and profiles: below 10 moe_gemm.cuh, below 20 moe_wide.cuh, below 30 moe_few.cuh, below 40
// few_stream.cuh, below 45 trellis_few.cuh, below 50 trellis_some.cuh, below 60 some_stream.cuh, else
// moe_wide.cuh with activations in fp16 (wide_halves.cuh).
// -1: an argument is wrong, or there are no rows.
int ccq_moe_gemm_variant(const struct ccq_moe_gemm_args* args);

// The same for any GPU, which need not be there: its multiprocessors, the major number of its compute capability, and the bytes
// of shared memory that a block may have.
int ccq_moe_gemm_choice(int sms, int major, int shared, int rows, int k, int n, int experts);

#ifdef __cplusplus
}
#endif
