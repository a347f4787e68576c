// SPDX-License-Identifier: Apache-2.0
// Repacking of WINT2 between the checkpoint's layout and the grouped GEMM's (repack.h describes both).
//
// The GEMM's unit is 16 columns by 128 rows: 512 bytes, 16 for each of the 32 lanes. With g = lane / 4 and t = lane % 4,
// a lane holds what the tensor core's A fragment (m16n8k16, weights as A) wants from it: columns g and g + 8, and of each
// 64-row group the four bytes (16 rows) number 4t..4t+3:
//
//   word 0: column g,     group 0      word 1: column g + 8, group 0
//   word 2: column g,     group 1      word 3: column g + 8, group 1
//
// Four neighbouring tiles (64 columns; the last group of a matrix may have fewer) interleave their units along K, so that
// a warp that walks down K of four tiles reads 2048 contiguous bytes at a time. ccq_unit_index in repack.h has the formula.
//
// A unit's scales are 16 bytes: for g in 0..7 a 16-bit word of four nibbles (g, group 0), (g, group 1), (g + 8, group 0),
// (g + 8, group 1), lowest bits first. FastDeploy has the even group in the high nibble.

#include "repack.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

constexpr int kColumns = 128;  // columns a block takes: eight tiles, one a warp
constexpr int kQuads = 32;     // packed rows (of four weights) in 128 rows

__device__ float wide(const void* p, size_t i, int dtype) {
  return dtype == CCQ_BF16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i])
                           : __half2float(static_cast<const __half*>(p)[i]);
}

__device__ bool integer_pair(float scale, float zp) {
  // Beyond 2^15 no code fits; the bound also keeps 255 * scale exact below. NaN fails every comparison.
  if (!(fabsf(scale) <= 32768.f && fabsf(zp) <= 32768.f)) return false;
  if (scale != rintf(scale) || zp != rintf(zp)) return false;
  float last = zp + 255.f * scale;
  return fminf(zp, last) >= 0.f && fmaxf(zp, last) < 32768.f;
}

// Source byte of (lane, byte) of a unit: the packed row inside the 128-row block and the column inside the tile.
__device__ void source_of(int lane, int byte, int* quad, int* column) {
  int word = byte / 4;
  *quad = (word / 2) * 16 + (lane % 4) * 4 + byte % 4;
  *column = lane / 4 + (word % 2) * 8;
}

template <bool kUnpack>
__global__ void __launch_bounds__(256) quant_kernel(uint8_t* checkpoint, uint8_t* packed, int k, int n) {
  __shared__ __align__(16) uint8_t tile[kQuads][kColumns + 4];  // + 4: lanes of one byte column fall in different banks
  const int kb = blockIdx.y, e = blockIdx.z, column0 = blockIdx.x * kColumns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = k / 128, tiles = n / 16, t16 = column0 / 16 + warp;
  uint8_t* plane = checkpoint + (static_cast<size_t>(e) * (k / 4) + kb * kQuads) * n;
  uint8_t* unit = packed + ccq_unit_index(e, t16, kb, tiles, blocks) * 512 + lane * 16;
  auto copy_plane = [&](bool load) {
    for (int i = threadIdx.x; i < kQuads * (kColumns / 16); i += 256) {
      int row = i / (kColumns / 16), c = i % (kColumns / 16) * 16;
      if (column0 + c >= n) continue;
      uint32_t* s = reinterpret_cast<uint32_t*>(&tile[row][c]);
      uint4* g = reinterpret_cast<uint4*>(plane + static_cast<size_t>(row) * n + column0 + c);
      if (load) {
        uint4 v = *g;
        s[0] = v.x, s[1] = v.y, s[2] = v.z, s[3] = v.w;
      } else {
        *g = make_uint4(s[0], s[1], s[2], s[3]);
      }
    }
  };
  if (!kUnpack) {
    copy_plane(true);
    __syncthreads();
  }
  if (t16 < tiles) {
    __align__(16) uint8_t bytes[16];
    if (kUnpack) *reinterpret_cast<uint4*>(bytes) = *reinterpret_cast<const uint4*>(unit);
#pragma unroll
    for (int b = 0; b < 16; ++b) {
      int quad, column;
      source_of(lane, b, &quad, &column);
      uint8_t& s = tile[quad][warp * 16 + column];
      if (kUnpack) s = bytes[b]; else bytes[b] = s;
    }
    if (!kUnpack) *reinterpret_cast<uint4*>(unit) = *reinterpret_cast<uint4*>(bytes);
  }
  if (kUnpack) {
    __syncthreads();
    copy_plane(false);
  }
}

// One thread per (expert, K block, column g < 8 of a tile).
template <bool kUnpack>
__global__ void scales_kernel(uint8_t* checkpoint, uint8_t* packed, int k, int n, size_t count) {
  size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int blocks = k / 128, tiles = n / 16;
  int g = i % 8, t16 = i / 8 % tiles;
  size_t block = i / 8 / tiles;  // e * blocks + kb
  size_t e = block / blocks;
  int kb = block % blocks;
  uint8_t* low = checkpoint + block * n + t16 * 16 + g;
  uint8_t* high = low + 8;
  uint8_t* out = packed + ccq_unit_index(e, t16, kb, tiles, blocks) * 16 + g * 2;
  auto swap = [](uint8_t v) { return static_cast<uint8_t>(v << 4 | v >> 4); };
  if (kUnpack) {
    *low = swap(out[0]), *high = swap(out[1]);
  } else {
    out[0] = swap(*low), out[1] = swap(*high);
  }
}

// Where column i of `count` has its words in the two planes (repack.h).
struct ColumnPlaces {
  size_t pair, super, floats;
  __device__ ColumnPlaces(size_t i, size_t count) {
    const size_t tile = i / 16 * 32;
    const int g = i % 8, upper = i % 16 / 8;
    pair = tile + g * 2 + upper, super = pair + 16, floats = count * 2 + tile + g * 4 + upper * 2;
  }
};

__global__ void columns_kernel(const void* super, int dtype, const float* scale, const float* zp, uint32_t* columns,
                               int32_t* pair_kind, size_t count) {
  size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const ColumnPlaces at(i, count);
  const bool integer = integer_pair(scale[i], zp[i]);
  columns[at.pair] = integer ? (static_cast<uint32_t>(__float2int_rn(scale[i])) & 0xFFFFu) |
                                   static_cast<uint32_t>(__float2int_rn(zp[i])) << 16
                             : 0u;
  columns[at.super] = __float_as_uint(wide(super, i, dtype));
  columns[at.floats] = __float_as_uint(scale[i]), columns[at.floats + 1] = __float_as_uint(zp[i]);
  // Every writer writes the same value, so the race is harmless.
  if (!integer) *pair_kind = CCQ_PAIRS_GENERAL;
}

__global__ void uncolumns_kernel(const uint32_t* columns, void* super, int dtype, float* scale, float* zp,
                                 size_t count) {
  size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const ColumnPlaces at(i, count);
  scale[i] = __uint_as_float(columns[at.floats]), zp[i] = __uint_as_float(columns[at.floats + 1]);
  float s = __uint_as_float(columns[at.super]);
  if (dtype == CCQ_BF16) static_cast<__nv_bfloat16*>(super)[i] = __float2bfloat16(s);
  else static_cast<__half*>(super)[i] = __float2half(s);
}

bool valid(int experts, int k, int n, int dtype) {
  return experts > 0 && experts <= 65535 && k > 0 && k % 128 == 0 && k / 128 <= 65535 && n > 0 && n % 16 == 0 &&
         (dtype == CCQ_BF16 || dtype == CCQ_FP16);
}

unsigned grid_of(size_t count) { return static_cast<unsigned>((count + 255) / 256); }

}  // namespace

extern "C" cudaError_t ccq_repack_wint2(const uint8_t* quant_weight, const uint8_t* weight_scale,
                                        const void* super_scales, int super_dtype, const float* code_scale,
                                        const float* code_zp, int experts, int k, int n, uint8_t* quant,
                                        uint8_t* scales, uint32_t* columns, int32_t* pair_kind, cudaStream_t stream) {
  if (!valid(experts, k, n, super_dtype)) return cudaErrorInvalidValue;
  cudaError_t error = cudaMemsetAsync(pair_kind, 0, sizeof(int32_t), stream);
  if (error != cudaSuccess) return error;
  dim3 grid((n + kColumns - 1) / kColumns, k / 128, experts);
  quant_kernel<false><<<grid, 256, 0, stream>>>(const_cast<uint8_t*>(quant_weight), quant, k, n);
  size_t count = static_cast<size_t>(experts) * (k / 128) * (n / 2), total = static_cast<size_t>(experts) * n;
  scales_kernel<false><<<grid_of(count), 256, 0, stream>>>(const_cast<uint8_t*>(weight_scale), scales, k, n, count);
  columns_kernel<<<grid_of(total), 256, 0, stream>>>(super_scales, super_dtype, code_scale, code_zp, columns,
                                                     pair_kind, total);
  return cudaGetLastError();
}

extern "C" cudaError_t ccq_unpack_wint2(const uint8_t* quant, const uint8_t* scales, const uint32_t* columns,
                                        int experts, int k, int n, uint8_t* quant_weight, uint8_t* weight_scale,
                                        void* super_scales, int super_dtype, float* code_scale, float* code_zp,
                                        cudaStream_t stream) {
  if (!valid(experts, k, n, super_dtype)) return cudaErrorInvalidValue;
  dim3 grid((n + kColumns - 1) / kColumns, k / 128, experts);
  quant_kernel<true><<<grid, 256, 0, stream>>>(quant_weight, const_cast<uint8_t*>(quant), k, n);
  size_t count = static_cast<size_t>(experts) * (k / 128) * (n / 2), total = static_cast<size_t>(experts) * n;
  scales_kernel<true><<<grid_of(count), 256, 0, stream>>>(weight_scale, const_cast<uint8_t*>(scales), k, n, count);
  uncolumns_kernel<<<grid_of(total), 256, 0, stream>>>(columns, super_scales, super_dtype, code_scale, code_zp, total);
  return cudaGetLastError();
}
