// SPDX-License-Identifier: Apache-2.0
// The kernel of linear_w8.h: weights as the tensor core's A, rows of x as its B, both as bfloat16.
//
// A tile is 64 * kM columns, 16 * kM of them for each of four warps; a unit is a tile's next 64 rows of the weight. All units of
// all tiles have one order, and each thread block takes a contiguous range of the same length (stream-K): every block reads the
// same number of bytes whatever the shape. Weights, and the rows of x that belong to a unit, come through a ring of
// asynchronous copies in the order in which lanes want them. Where a tile is split, each block writes its partial results to the
// workspace, and the warp that comes last adds them in the order of the blocks: the result does not depend on who was last.
//
// Tried on an H200 and slower: float16 in bfloat16's place, a byte in half an instruction, which needs a kernel before that
// scales x (docs/notes/vllm.md).
#pragma once

#include <cuda_bf16.h>

#include "../common/launch.cuh"
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
// Four bytes as two pairs of bfloat16; 8 significant bits hold every state, so cutting the lower half off is exact.
__device__ inline void to_bfloat16(uint32_t word, uint32_t* low, uint32_t* high) {
  *low = __byte_perm(__float_as_uint(state<0>(word)), __float_as_uint(state<1>(word)), 0x7632);
  *high = __byte_perm(__float_as_uint(state<2>(word)), __float_as_uint(state<3>(word)), 0x7632);
}

__device__ inline void multiply(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Which units belong to a block, and which block has a unit.
struct StreamK {
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
__device__ inline void store(const ccq_linear_w8_args& a, const Sums<kM, kN>& sums, int first_unit) {
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
                __float2bfloat16_rn(sums.value[m][n][2 * h + i] * s);
        }
    }
  }
}

// Puts aside the partial results of a split tile; the last of its blocks adds all and stores.
template <int kM, int kN>
__device__ inline void combine(const ccq_linear_w8_args& a, const StreamK& stream_k, Sums<kM, kN>& sums,
                               int tile, int first_unit, bool first_of_block) {
  // Partial results read at once: one after the other each would wait for the cache.
  constexpr int kFloats = kM * kN * 4, kAtOnce = kFloats <= 8 ? 8 : kFloats <= 16 ? 4 : 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* parts = static_cast<float*>(a.workspace);
  auto place = [&](int block, bool first) {
    return parts + ((static_cast<int64_t>(block) * 2 + (first ? 0 : 1)) * kWarps + warp) * kFloats * 32 + lane;
  };
  float* own = place(blockIdx.x, first_of_block);
#pragma unroll
  for (int i = 0; i < kFloats; ++i) own[i * 32] = (&sums.value[0][0][0])[i];
  __threadfence();
  __syncwarp();
  const int64_t begin = static_cast<int64_t>(tile) * stream_k.steps;
  const int from = stream_k.block_of(begin), to = stream_k.block_of(begin + stream_k.steps - 1);
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
      const float* part = place(block, stream_k.begin(block) / stream_k.steps == tile);
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
  store<kM, kN>(a, sums, first_unit);
}

template <int kM, int kN, int kStages>
struct Ring {
  static constexpr int kX = kWarps * 2 * kM * 32, kStage = kX + 2 * kN * 32;  // in 16-byte pieces
  static constexpr size_t kBytes = size_t{16} * kStages * kStage;
};

template <int kM, int kN, int kStages, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    product(const __grid_constant__ ccq_linear_w8_args a, const __grid_constant__ StreamK stream_k) {
  using R = Ring<kM, kN, kStages>;
  extern __shared__ uint4 ring[];  // [stage]: weights [warp][2 kM][lane], then x [2 kN][lane]
  ccq::dependents_may_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t begin = stream_k.begin(blockIdx.x), end = stream_k.begin(blockIdx.x + 1);
  const int steps = stream_k.steps, left = static_cast<int>(end - begin);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(ring)) + lane * 16;
  const auto* weight = static_cast<const char*>(a.weight) + lane * 16;
  // The weights are nobody's result: the first may be fetched while the kernel before still runs.
  int tile_w = static_cast<int>(begin / steps), step_w = static_cast<int>(begin % steps), asked_w = 0;
  auto fetch_weights = [&] {
    if (asked_w >= left) return;
    const uint32_t to = address + (asked_w % kStages * R::kStage + warp * 2 * kM * 32) * 16;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int unit = (tile_w * kWarps + warp) * kM + m;
      const bool valid = unit * 16 < a.n;
      const char* from = weight + (static_cast<int64_t>(valid ? unit : 0) * steps + step_w) * kUnitBytes;
      copy16(to + 2 * m * 512, from, valid);
      copy16(to + (2 * m + 1) * 512, from + 512, valid);
    }
    ++asked_w;
    if (++step_w == steps) step_w = 0, ++tile_w;
  };
  const char* x = static_cast<const char*>(a.x) + t * 32;
  int step_x = static_cast<int>(begin % steps), asked_x = 0;
  auto fetch_x = [&] {
    if (asked_x >= left) return;
    const uint32_t to = address + (asked_x % kStages * R::kStage + R::kX) * 16;
#pragma unroll
    for (int p = 0; p < 2 * kN; p += kWarps) {
      const int piece = p + warp, row = piece / 2 * 8 + g;
      if (piece >= 2 * kN) break;
      const bool valid = row < a.rows;
      const char* from = x + (static_cast<int64_t>(valid ? row : 0) * a.k + step_x * kRows) * 2 + piece % 2 * 16;
      copy16(to + piece * 512, from, valid);
    }
    ++asked_x;
    if (++step_x == steps) step_x = 0;
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch_weights(), commit();
  ccq::wait_for_prerequisites();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch_x(), commit();

  int tile = static_cast<int>(begin / steps), step = static_cast<int>(begin % steps);
  bool whole = step == 0, first_of_block = true;
  Sums<kM, kN> sums;
  sums.clear();
  for (int u = 0; u < left; ++u) {
    wait<kStages - 2>();
    __syncthreads();  // what all have copied is there, and all are done with the stage that is filled next
    fetch_weights(), fetch_x(), commit();
    const uint4* stage = ring + u % kStages * R::kStage + lane;
    uint4 w[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) w[m][h] = stage[(warp * 2 * kM + 2 * m + h) * 32];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 b[kN];
#pragma unroll
      for (int n = 0; n < kN; ++n) b[n] = stage[R::kX + (2 * n + half) * 32];
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          uint32_t fragment[4];
          const uint32_t low = word_of(w[m][0], 2 * half + s), high = word_of(w[m][1], 2 * half + s);
          to_bfloat16(low, &fragment[0], &fragment[2]), to_bfloat16(high, &fragment[1], &fragment[3]);
#pragma unroll
          for (int n = 0; n < kN; ++n)
            multiply(sums.value[m][n], fragment, word_of(b[n], 2 * s), word_of(b[n], 2 * s + 1));
        }
    }
    if (++step < steps && u + 1 < left) continue;
    const int first_unit = (tile * kWarps + warp) * kM;
    if (first_unit * 16 < a.n) {
      if (whole && step == steps) store<kM, kN>(a, sums, first_unit);
      else combine<kM, kN>(a, stream_k, sums, tile, first_unit, first_of_block);
    }
    sums.clear();
    step = 0, ++tile, whole = true, first_of_block = false;
  }
}

}  // namespace ccq_w8
