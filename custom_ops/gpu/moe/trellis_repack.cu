// SPDX-License-Identifier: Apache-2.0
// Repacking of CCQ-2T between the checkpoint's layout and the products' (trellis_repack.h describes it).

#include "trellis_repack.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

constexpr int kColumns = 64, kQuads = 32, kUnitBytes = 2176, kThreads = 128;

__host__ __device__ int column_tiles(int n) { return (n + kColumns - 1) / kColumns; }

// A block: one unit.
template <bool kUnpack>
__global__ void __launch_bounds__(kThreads) units_kernel(uint8_t* codes, uint8_t* scales, const uint8_t* earlier, uint8_t* units, int k, int n) {
  __shared__ __align__(16) uint8_t tile[kQuads][kColumns + 4];  // + 4: lanes of one byte column fall in different banks
  __shared__ uint8_t before[kColumns];
  const int kb = blockIdx.y, e = blockIdx.z, first = blockIdx.x * kColumns, blocks_k = k / 128;
  uint8_t* const plane = codes + (static_cast<size_t>(e) * (k / 4) + kb * kQuads) * n + first;
  uint8_t* const scale = scales + (static_cast<size_t>(e) * blocks_k + kb) * n + first;
  uint8_t* const unit = units + ((static_cast<size_t>(e) * gridDim.x + blockIdx.x) * blocks_k + kb) * kUnitBytes;
  auto copy_plane = [&](bool load) {
    for (int i = threadIdx.x; i < kQuads * (kColumns / 4); i += kThreads) {
      const int row = i / (kColumns / 4), c = i % (kColumns / 4) * 4;
      uint32_t& own = *reinterpret_cast<uint32_t*>(&tile[row][c]);
      uint32_t* const other = reinterpret_cast<uint32_t*>(plane + static_cast<size_t>(row) * n + c);
      if (load) own = first + c < n ? *other : 0u;
      else if (first + c < n) *other = own;
    }
  };
  if (!kUnpack) {
    copy_plane(true);
    const int column = threadIdx.x;
    if (column < kColumns) {
      const bool there = first + column < n;
      const uint8_t* const from = kb > 0 ? plane - n : earlier ? earlier + static_cast<size_t>(e) * n + first : nullptr;
      before[column] = there && from ? from[column] : 0;
    }
    __syncthreads();
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __align__(16) uint8_t bytes[16];
  if (kUnpack) *reinterpret_cast<uint4*>(bytes) = *reinterpret_cast<const uint4*>(unit + threadIdx.x * 16);
#pragma unroll
  for (int b = 0; b < 16; ++b) {
    uint8_t& own = tile[lane / 16 * 16 + b][warp * 16 + lane % 16];
    if (kUnpack) own = bytes[b]; else bytes[b] = own;
  }
  if (!kUnpack) *reinterpret_cast<uint4*>(unit + threadIdx.x * 16) = *reinterpret_cast<uint4*>(bytes);
  if (lane < 8) {
    const int left = warp * 16 + lane, right = left + 8;
    uint32_t& word = *reinterpret_cast<uint32_t*>(unit + 2048 + warp * 32 + lane * 4);
    auto swap = [](uint32_t v) { return (v << 4 | v >> 4) & 255; };  // FastDeploy has the even group in the high nibble
    if (kUnpack) {
      if (first + left < n) scale[left] = static_cast<uint8_t>(swap(word & 255)), scale[right] = static_cast<uint8_t>(swap(word >> 8 & 255));
    } else {
      const bool there = first + left < n;
      word = (there ? swap(scale[left]) | swap(scale[right]) << 8 : 0u) | before[left] << 16 | static_cast<uint32_t>(before[right]) << 24;
    }
  }
  if (kUnpack) {
    __syncthreads();
    copy_plane(false);
  }
}

template <bool kUnpack>
__global__ void supers_kernel(void* supers, int dtype, float* columns, int n, size_t count) {
  const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x, padded = column_tiles(n) * kColumns;
  if (i >= count) return;
  const size_t e = i / padded, c = i % padded, at = e * n + c;
  const bool there = c < static_cast<size_t>(n);
  if (kUnpack) {
    if (!there) return;
    if (dtype == CCQ_BF16) static_cast<__nv_bfloat16*>(supers)[at] = __float2bfloat16(columns[i]);
    else static_cast<__half*>(supers)[at] = __float2half(columns[i]);
  } else {
    columns[i] = !there ? 0.f : dtype == CCQ_BF16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(supers)[at])
                                                  : __half2float(static_cast<const __half*>(supers)[at]);
  }
}

bool valid(int experts, int k, int n, int dtype) {
  return experts > 0 && experts <= 65535 && k > 0 && k % 128 == 0 && k / 128 <= 65535 && n > 0 && n % 16 == 0 &&
         (dtype == CCQ_BF16 || dtype == CCQ_FP16);
}

template <bool kUnpack>
cudaError_t run(uint8_t* codes, uint8_t* scales, void* supers, int dtype, const uint8_t* before, int experts, int k, int n, uint8_t* units, float* columns,
                cudaStream_t stream) {
  if (!valid(experts, k, n, dtype)) return cudaErrorInvalidValue;
  units_kernel<kUnpack><<<dim3(column_tiles(n), k / 128, experts), kThreads, 0, stream>>>(codes, scales, before, units, k, n);
  const size_t count = static_cast<size_t>(experts) * column_tiles(n) * kColumns;
  supers_kernel<kUnpack><<<static_cast<unsigned>((count + 255) / 256), 256, 0, stream>>>(supers, dtype, columns, n, count);
  return cudaGetLastError();
}

}  // namespace

extern "C" size_t ccq_trellis_units_bytes(int experts, int k, int n) {
  return static_cast<size_t>(experts) * column_tiles(n) * (k / 128) * kUnitBytes;
}
extern "C" size_t ccq_trellis_columns_bytes(int experts, int n) {
  return static_cast<size_t>(experts) * column_tiles(n) * kColumns * sizeof(float);
}

extern "C" cudaError_t ccq_repack_trellis(const uint8_t* quant_weight, const uint8_t* weight_scale, const void* super_scales,
                                          int super_dtype, const uint8_t* before, int experts, int k, int n, uint8_t* units,
                                          float* columns, cudaStream_t stream) {
  return run<false>(const_cast<uint8_t*>(quant_weight), const_cast<uint8_t*>(weight_scale), const_cast<void*>(super_scales),
                    super_dtype, before, experts, k, n, units, columns, stream);
}

extern "C" cudaError_t ccq_unpack_trellis(const uint8_t* units, const float* columns, int experts, int k, int n,
                                          uint8_t* quant_weight, uint8_t* weight_scale, void* super_scales, int super_dtype,
                                          cudaStream_t stream) {
  return run<true>(quant_weight, weight_scale, super_scales, super_dtype, nullptr, experts, k, n, const_cast<uint8_t*>(units),
                   const_cast<float*>(columns), stream);
}
