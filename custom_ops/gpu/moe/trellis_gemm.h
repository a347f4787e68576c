// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM with CCQ-2T weights, for moe_gemm.cu: arguments have been checked, there are rows.
#pragma once

#include "moe_gemm.h"

namespace ccq {

struct Gpu;
struct Call;
struct Device;

// Which kernel (choice.h, trellis_choice), -1 if none.
int trellis_variant(const Gpu& gpu, const Call& call);
cudaError_t trellis_gemm(const Device& device, const ccq_moe_gemm_args& a, int variant, cudaStream_t stream);

}  // namespace ccq
