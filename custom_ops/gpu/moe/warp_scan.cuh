// SPDX-License-Identifier: Apache-2.0
// A prefix sum over the lanes of a warp.
#pragma once

namespace ccq {

// The sum of `own` of the lanes up to this one, which is `lane`. All lanes together.
__device__ inline int prefix_sum(int lane, int own) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, own, distance);
    if (lane >= distance) own += other;
  }
  return own;
}

}  // namespace ccq
