// SPDX-License-Identifier: Apache-2.0
// Eight 16-bit floats in one 128-bit register group, as float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "repack.h"

namespace ccq_half8 {

template <int kDtype>
__device__ inline float to_float(uint16_t bits) {
  if (kDtype == CCQ_BF16) return __bfloat162float(__ushort_as_bfloat16(bits));
  return __half2float(__ushort_as_half(bits));
}

template <int kDtype>
__device__ inline uint16_t from_float(float f) {
  if (kDtype == CCQ_BF16) return __bfloat16_as_ushort(__float2bfloat16_rn(f));
  return __half_as_ushort(__float2half_rn(f));
}

template <int kDtype>
__device__ inline void unpack(uint4 v, float* f) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = to_float<kDtype>(static_cast<uint16_t>(words[i]));
    f[2 * i + 1] = to_float<kDtype>(static_cast<uint16_t>(words[i] >> 16));
  }
}

template <int kDtype>
__device__ inline uint4 pack(const float* f) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = from_float<kDtype>(f[2 * i]) | static_cast<uint32_t>(from_float<kDtype>(f[2 * i + 1])) << 16;
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace ccq_half8
