// SPDX-License-Identifier: Apache-2.0
// The kernels of linear_w8.h: weights as the tensor core's A, rows of x as its B, both as float16.
//
// A byte becomes an exact float16 in half an instruction, and an exact bfloat16 only in four times as many; the memory of a
// Hopper GPU is fast enough for that to count. So a first kernel turns x into float16, each row times the power of two that
// brings its largest value to 2^14..2^15: exact but for values 2^-31 of the largest or smaller.
//
// A tile is 64 * kM columns, 16 * kM of them for each of four warps. Tile after tile, each in steps of 64 rows of the weight,
// lies in one line of units that is cut into equal pieces, one a block (stream-K): every block reads the same number of bytes
// whatever the shape. A warp fetches its own weights through a ring of asynchronous copies in which each lane reads what it
// has itself copied, so that no barrier is needed anywhere. Where a tile is cut, each part writes its sums to the workspace,
// and the warp that comes last adds them in the order of the blocks: the result does not depend on who was last.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"
#include "linear_w8.h"

namespace ccq_w8 {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 64, kUnitBytes = 1024;

__device__ inline void copy16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kPending>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ inline uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Byte i of a word, which is a state plus 128, as an exact float32: 2^23 + byte, less 2^23 + 128.
template <int kByte>
__device__ inline float state(uint32_t word) {
  return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 + kByte)) - 8388736.0f;
}
// Four bytes, states plus 128, as two pairs of exact float16: 1024 + byte, less 1152.
__device__ inline void to_half(uint32_t word, uint32_t* low, uint32_t* high) {
  const __half2 offset = __half2half2(__ushort_as_half(0x6480));  // 1152
  const uint32_t pairs[2] = {__byte_perm(word, 0x64646464u, 0x4140), __byte_perm(word, 0x64646464u, 0x4342)};
  const __half2 a = __hsub2(*reinterpret_cast<const __half2*>(&pairs[0]), offset);
  const __half2 b = __hsub2(*reinterpret_cast<const __half2*>(&pairs[1]), offset);
  *low = *reinterpret_cast<const uint32_t*>(&a), *high = *reinterpret_cast<const uint32_t*>(&b);
}

__device__ inline void multiply(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}


constexpr int kPrepareThreads = 512;

// What the first kernel leaves at the start of the workspace, and where the parts of tiles begin.
struct Prepared {
  __half* x;       // [rows, k]
  float* inverse;  // [kMaxRows], of each row's power of two
  float* parts;
  static constexpr int kMaxRows = CCQ_LINEAR_W8_MAX_ROWS;
  static __host__ __device__ size_t rows_bytes(int rows, int k) { return size_t{2} * rows * k; }  // 128 divides it
  static __host__ __device__ size_t bytes(int rows, int k) { return rows_bytes(rows, k) + sizeof(float) * kMaxRows; }
  __device__ Prepared(const ccq_linear_w8_args& a) {
    char* start = static_cast<char*>(a.workspace);
    x = reinterpret_cast<__half*>(start), inverse = reinterpret_cast<float*>(start + rows_bytes(a.rows, a.k));
    parts = inverse + kMaxRows;
  }
};

// One block a row.
__global__ void __launch_bounds__(kPrepareThreads) prepare(const __grid_constant__ ccq_linear_w8_args a) {
  __shared__ uint32_t largest[kPrepareThreads / 32];
  ccq::dependents_may_start();
  ccq::wait_for_prerequisites();
  const Prepared to(a);
  const int row = blockIdx.x, words = a.k / 8;
  const auto* x = reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(a.x) + static_cast<int64_t>(row) * a.k);
  uint32_t most = 0;  // magnitudes of bfloat16 compare as integers
  for (int i = threadIdx.x; i < words; i += kPrepareThreads) {
    const uint4 v = x[i];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t word = word_of(v, w);
      most = max(most, max(word & 0x7FFFu, word >> 16 & 0x7FFFu));
    }
  }
  most = __reduce_max_sync(0xFFFFFFFFu, most);
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
  __syncthreads();
  for (int i = 0; i < kPrepareThreads / 32; ++i) most = max(most, largest[i]);
  const int power = min(141 - static_cast<int>(most >> 7), 126);  // 2^power * largest in [2^14, 2^15)
  const float scale = __uint_as_float(static_cast<uint32_t>(power + 127) << 23);
  if (threadIdx.x == 0) to.inverse[row] = __uint_as_float(static_cast<uint32_t>(127 - power) << 23);
  auto* out = reinterpret_cast<uint4*>(to.x + static_cast<int64_t>(row) * a.k);
  for (int i = threadIdx.x; i < words; i += kPrepareThreads) {
    const uint4 v = x[i];
    uint32_t made[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t word = word_of(v, w);
      const __half2 pair = __floats2half2_rn(__uint_as_float(word << 16) * scale, __uint_as_float(word & 0xFFFF0000u) * scale);
      made[w] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    out[i] = make_uint4(made[0], made[1], made[2], made[3]);
  }
}

// Which units belong to a block, and which blocks to a tile.
struct Line {
  int64_t units;
  int blocks, steps;
  __device__ int64_t begin(int block) const { return units * block / blocks; }
  __device__ int block_of(int64_t unit) const { return static_cast<int>(((unit + 1) * blocks - 1) / units); }
};

template <int kM, int kN>
struct Sums {
  float value[kM][kN][4];
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i) (&value[0][0][0])[i] = 0.0f;
  }
};

template <int kM, int kN>
__device__ inline void store(const ccq_linear_w8_args& a, const Prepared& from, const Sums<kM, kN>& sums, int first_unit) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  auto* out = static_cast<__nv_bfloat16*>(a.out);
  const auto* scale = static_cast<const __nv_bfloat16*>(a.scale);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    if ((first_unit + m) * 16 >= a.n) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = (first_unit + m) * 16 + 8 * h + g;
      const float s = __bfloat162float(scale[column]);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = 8 * n + 2 * t + i;
          if (row < a.rows)
            out[static_cast<int64_t>(row) * a.n + column] =
                __float2bfloat16_rn(sums.value[m][n][2 * h + i] * from.inverse[row] * s);
        }
    }
  }
}

// Puts a part of a tile aside; the last of its parts adds all and stores.
template <int kM, int kN>
__device__ inline void combine(const ccq_linear_w8_args& a, const Prepared& from_x, const Line& line, Sums<kM, kN>& sums,
                               int tile, int first_unit, bool first_of_block) {
  // Parts read at once: one after the other each would wait for the cache.
  constexpr int kFloats = kM * kN * 4, kAtOnce = kFloats <= 8 ? 8 : kFloats <= 16 ? 4 : 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto place = [&](int block, bool first) {
    return from_x.parts + ((static_cast<int64_t>(block) * 2 + (first ? 0 : 1)) * kWarps + warp) * kFloats * 32 + lane;
  };
  float* own = place(blockIdx.x, first_of_block);
#pragma unroll
  for (int i = 0; i < kFloats; ++i) own[i * 32] = (&sums.value[0][0][0])[i];
  __threadfence();
  __syncwarp();
  const int64_t begin = static_cast<int64_t>(tile) * line.steps;
  const int from = line.block_of(begin), to = line.block_of(begin + line.steps - 1);
  int32_t* counter = a.counters + tile * kWarps + warp;
  int before = lane == 0 ? atomicAdd(counter, 1) : 0;
  before = __shfl_sync(0xFFFFFFFFu, before, 0);
  if (before != to - from) return;
  __threadfence();
  sums.clear();
  for (int first = from; first <= to; first += kAtOnce) {
    float found[kAtOnce][kFloats];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int block = min(first + j, to);
      const float* part = place(block, line.begin(block) / line.steps == tile);
#pragma unroll
      for (int i = 0; i < kFloats; ++i) found[j][i] = __ldcg(part + i * 32);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
      for (int i = 0; i < kFloats; ++i)
        if (first + j <= to) (&sums.value[0][0][0])[i] += found[j][i];
  }
  if (lane == 0) *counter = 0;
  store<kM, kN>(a, from_x, sums, first_unit);
}

template <int kM, int kN, int kStages, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    product(const __grid_constant__ ccq_linear_w8_args a, const __grid_constant__ Line line) {
  extern __shared__ uint4 ring[];  // [warp][stage][2 kM][lane]
  ccq::dependents_may_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t begin = line.begin(blockIdx.x), end = line.begin(blockIdx.x + 1);
  const int steps = line.steps, left = static_cast<int>(end - begin);
  uint4* mine = ring + warp * kStages * 2 * kM * 32 + lane;
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  const auto* weight = static_cast<const char*>(a.weight) + lane * 16;
  // The weights are nobody's result: the first may be fetched while the kernel before still runs.
  int next_tile = static_cast<int>(begin / steps), next_step = static_cast<int>(begin % steps), asked = 0;
  auto fetch = [&](int stage) {
    if (asked < left) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int unit = (next_tile * kWarps + warp) * kM + m;
        const bool valid = unit * 16 < a.n;
        const char* from = weight + (static_cast<int64_t>(valid ? unit : 0) * steps + next_step) * kUnitBytes;
        copy16(address + (stage * 2 * kM + 2 * m) * 512, from, valid);
        copy16(address + (stage * 2 * kM + 2 * m + 1) * 512, from + 512, valid);
      }
      ++asked;
      if (++next_step == steps) next_step = 0, ++next_tile;
    }
    commit();
  };
#pragma unroll
  for (int s = 0; s < kStages; ++s) fetch(s);
  ccq::wait_for_prerequisites();

  const Prepared prepared(a);
  const auto* x = reinterpret_cast<const uint4*>(prepared.x) + 2 * t;  // of 8 float16
  const int64_t row_words = a.k / 8;
  int tile = static_cast<int>(begin / steps), step = static_cast<int>(begin % steps), stage = 0;
  bool whole = step == 0, first_of_block = true;
  Sums<kM, kN> sums;
  sums.clear();
  for (int u = 0; u < left; ++u) {
    wait<kStages - 1>();
    uint4 w[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      w[m][0] = mine[(stage * 2 * kM + 2 * m) * 32];
      w[m][1] = mine[(stage * 2 * kM + 2 * m + 1) * 32];
    }
    fetch(stage);
    if (++stage == kStages) stage = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 b[kN];
#pragma unroll
      for (int n = 0; n < kN; ++n)
        b[n] = 8 * n + g < a.rows ? x[(8 * n + g) * row_words + step * (kRows / 8) + half] : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          uint32_t fragment[4];
          to_half(word_of(w[m][0], 2 * half + s), &fragment[0], &fragment[2]);
          to_half(word_of(w[m][1], 2 * half + s), &fragment[1], &fragment[3]);
#pragma unroll
          for (int n = 0; n < kN; ++n) multiply(sums.value[m][n], fragment, word_of(b[n], 2 * s), word_of(b[n], 2 * s + 1));
        }
    }
    if (++step < steps && u + 1 < left) continue;
    const int first_unit = (tile * kWarps + warp) * kM;
    if (first_unit * 16 < a.n) {
      if (whole && step == steps) store<kM, kN>(a, prepared, sums, first_unit);
      else combine<kM, kN>(a, prepared, line, sums, tile, first_unit, first_of_block);
    }
    sums.clear();
    step = 0, ++tile, whole = true, first_of_block = false;
  }
}

}  // namespace ccq_w8
