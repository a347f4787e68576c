// SPDX-License-Identifier: Apache-2.0
// The whole expert block out of the grouped GEMM, SwiGLU, dispatch and combine; a fixed sequence of launches.
#pragma once

#include "moe_gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

// One projection of all experts, from ccq_repack_wint2.
struct ccq_moe_projection {
  const uint8_t* quant;
  const uint8_t* scales;
  const uint32_t* columns;
  int pairs;  // enum ccq_pairs
};

struct ccq_moe_shape {
  int hidden, width, experts;  // up_gate [hidden, 2 * width], down [width, hidden]; 128 divides both
  int dtype, row_order;        // enum ccq_dtype, enum ccq_row_order
};

// out [rows, hidden] = down(silu(gate(x)) * up(x)), rows sorted by expert; offsets as in ccq_moe_gemm.
size_t ccq_moe_ffn_workspace(int rows, const struct ccq_moe_shape* shape);
cudaError_t ccq_moe_ffn(const void* x, const int64_t* offsets, int rows, const struct ccq_moe_shape* shape,
                        const struct ccq_moe_projection* up_gate, const struct ccq_moe_projection* down, void* out,
                        void* workspace, cudaStream_t stream);

// out [tokens, hidden] = sum over j of weights[t, j] * ffn of expert ids[t, j] on x[t] (dispatch.h).
size_t ccq_moe_workspace(int tokens, int top_k, const struct ccq_moe_shape* shape);
cudaError_t ccq_moe(const void* x, const int64_t* ids, const float* weights, int tokens, int top_k,
                    const struct ccq_moe_shape* shape, const struct ccq_moe_projection* up_gate,
                    const struct ccq_moe_projection* down, void* out, void* workspace, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
