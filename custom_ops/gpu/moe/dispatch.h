// SPDX-License-Identifier: Apache-2.0
// Tokens to experts and back: sort by expert, gather rows, combine weighted results.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Sorts the tokens * top_k choices by expert, choices of one expert in order; no atomics, so the same on every run.
//   ids      device int64 [tokens, top_k]; an id outside 0..experts-1 takes no row and adds nothing
//   offsets  device int64 [experts]: inclusive prefix sums of rows per expert
//   place    device int32 [tokens, top_k]: row of each choice, -1 for an id outside
//   x, rows  device [tokens, hidden] and [tokens * top_k, hidden] of any 16-bit type: rows[place] = x[token];
//            rows from offsets[experts-1] on are left as they are. 8 | hidden, 16-byte aligned.
// One kernel for up to 256 choices, else two; no synchronization. cudaErrorInvalidValue: a size out of range.
cudaError_t ccq_moe_dispatch(const int64_t* ids, const void* x, int tokens, int top_k, int experts, int hidden,
                             int64_t* offsets, int32_t* place, void* rows, cudaStream_t stream);

// out[t] = sum over j of weights[t, j] * rows[place[t, j]], float32 in the order of j, rounded once to `dtype`.
cudaError_t ccq_moe_combine(const void* rows, const int32_t* place, const float* weights, int tokens, int top_k,
                            int hidden, int dtype, void* out, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
