// SPDX-License-Identifier: Apache-2.0
// Launch of few_stream.cuh's kernels (host side; apart from moe_gemm.cu, so that the two compile side by side).
#pragma once

#include "moe_gemm.h"

namespace ccq {

// Bytes of shared memory that kernel `variant` (choice.h) needs at least for a call; more than any GPU has where it cannot serve it.
size_t stream_few_shared(int variant, int k, int experts);

// The grouped GEMM of valid arguments on a GPU of sm_90 with `sms` multiprocessors and `shared` bytes of shared memory for a block.
cudaError_t stream_few_gemm(const ccq_moe_gemm_args& args, int variant, int sms, int shared, cudaStream_t stream);

#ifdef CCQ_TUNING
extern int g_stream_stages;  // forced by benchmarks; 0: as always
#endif

}  // namespace ccq
