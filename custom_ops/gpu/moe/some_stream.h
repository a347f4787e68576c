// SPDX-License-Identifier: Apache-2.0
// Launcher of some_stream.cuh, in a source of its own. Kernels are numbered as in choice.h.
#pragma once

#include "gemm_launch.cuh"

namespace ccq {

// Bytes of shared memory that a call takes; more than any GPU has where the kernel is not compiled.
size_t some_stream_shared(int variant);
cudaError_t some_stream_gemm(const ccq_moe_gemm_args& a, int variant, const Device& device, cudaStream_t stream);

}  // namespace ccq
