// SPDX-License-Identifier: Apache-2.0
// One thread decodes one group of one column; a warp reads and writes 32 neighbouring columns.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dequant.h"

namespace ccq_dequant_kernel {

constexpr int kGroup = 64;
constexpr int kThreads = 128;

template <int kRuntime>
__device__ inline float rounded(float f) {
  if (kRuntime == CCQ_RUNTIME_BF16) return __bfloat162float(__float2bfloat16_rn(f));
  if (kRuntime == CCQ_RUNTIME_FP16) return __half2float(__float2half_rn(f));
  return f;
}

template <int kRuntime>
__device__ inline void put(void* out, int64_t at, float f) {
  if (kRuntime == CCQ_RUNTIME_BF16) static_cast<__nv_bfloat16*>(out)[at] = __float2bfloat16_rn(f);
  else if (kRuntime == CCQ_RUNTIME_FP16) static_cast<__half*>(out)[at] = __float2half_rn(f);
  else static_cast<float*>(out)[at] = f;
}

__device__ inline float super_of(const ccq_dequant_args& a, int64_t c) {
  return __uint_as_float(static_cast<uint32_t>(a.super_scales[c]) << 16);
}

template <int kRuntime>
__device__ void wint2_group(const ccq_dequant_args& a, int64_t g, int64_t c) {
  const uint8_t both = a.weight_scale[g / 2 * a.n + c];
  // The kernel this stands for rounds the scale and then the product.
  const float scale = rounded<kRuntime>(__fmul_rn(static_cast<float>(g % 2 ? both & 15 : both >> 4), super_of(a, c)));
  const float code_scale = a.code_scale[c], offset = __fadd_rn(a.code_zp[c], 0.5f);
  const uint8_t* q = static_cast<const uint8_t*>(a.quant_weight) + g * 16 * a.n + c;
#pragma unroll 4
  for (int i = 0; i < 16; ++i) {
    const int code = __float2int_rd(__fmaf_rn(static_cast<float>(q[i * a.n]), code_scale, offset));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int state = ((code >> (9 - 3 * j)) & 63) - 32;
      put<kRuntime>(a.out, (g * kGroup + i * 4 + j) * a.n + c, __fmul_rn(static_cast<float>(state), scale));
    }
  }
}

// kWords words of kPerWord states of kBits, the first topmost; the last word has one and the scale below it.
template <int kRuntime, typename Word, int kWords, int kPerWord, int kBits, int kScaleBits>
__device__ void spare_scale_group(const ccq_dequant_args& a, int64_t g, int64_t c) {
  const Word* words = static_cast<const Word*>(a.quant_weight) + g * kWords * a.n + c;
  const int last = words[(kWords - 1) * a.n];
  const float scale = __fmul_rn(static_cast<float>(last & ((1 << kScaleBits) - 1)), super_of(a, c));
  for (int w = 0; w < kWords; ++w) {
    const int word = words[w * a.n];
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) {
      if (w == kWords - 1 && i > 0) break;
      // 2.5: codes (3, 3, 2) above (3, 4, 2), so the step between states is 2 bits except at the seam.
      const int shift = kPerWord == 3 ? 4 - 2 * i : (i < 3 ? 13 - 2 * i : 12 - 2 * i);
      const int state = ((word >> shift) & ((1 << kBits) - 1)) - (1 << (kBits - 1));
      put<kRuntime>(a.out, (g * kGroup + w * kPerWord + i) * a.n + c, __fmul_rn(static_cast<float>(state), scale));
    }
  }
}

template <int kRuntime>
__global__ void __launch_bounds__(kThreads) dequantize(const __grid_constant__ ccq_dequant_args a) {
  const int64_t c = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x, g = blockIdx.x;
  if (c >= a.n) return;
  if (a.format == CCQ_WINT2) wint2_group<kRuntime>(a, g, c);
  else if (a.format == CCQ_CCQ25) spare_scale_group<kRuntime, uint16_t, 10, 7, 3, 13>(a, g, c);
  else spare_scale_group<kRuntime, uint8_t, 22, 3, 4, 4>(a, g, c);
}

}  // namespace ccq_dequant_kernel

extern "C" cudaError_t ccq_dequant(const ccq_dequant_args* args, cudaStream_t stream) {
  using namespace ccq_dequant_kernel;
  const ccq_dequant_args& a = *args;
  const int step = a.format == CCQ_WINT2 ? 2 * kGroup : kGroup;
  const int64_t columns = (a.n + kThreads - 1) / kThreads;
  if (a.format < CCQ_WINT2 || a.format > CCQ_CCQ275 || a.k < step || a.k % step || a.n < 1 || columns > 65535)
    return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(a.k / kGroup), static_cast<unsigned>(columns));
  switch (a.runtime) {
    case CCQ_RUNTIME_BF16: dequantize<CCQ_RUNTIME_BF16><<<grid, kThreads, 0, stream>>>(a); break;
    case CCQ_RUNTIME_FP16: dequantize<CCQ_RUNTIME_FP16><<<grid, kThreads, 0, stream>>>(a); break;
    case CCQ_RUNTIME_FP32: dequantize<CCQ_RUNTIME_FP32><<<grid, kThreads, 0, stream>>>(a); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
