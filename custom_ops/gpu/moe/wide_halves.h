// SPDX-License-Identifier: Apache-2.0
// Launcher of moe_wide.cuh with activations in fp16 (wide_halves.cuh), in a source of its own. Kernels are numbered as in choice.h.
#pragma once

#include "gemm_launch.cuh"

namespace ccq {

// Bytes of shared memory that a call takes; more than any GPU has where the kernel is not compiled.
size_t wide_halves_shared(int variant);
cudaError_t wide_halves_gemm(const ccq_moe_gemm_args& a, int variant, const Device& device, cudaStream_t stream);

}  // namespace ccq
