// SPDX-License-Identifier: Apache-2.0
// The kernel of linear_w8.h for 9 to 64 rows on Hopper: activations as integers in the shared memory of a cluster.
//
// A cluster of kC blocks has a range of tiles of 64 columns. Each block has a slice of K: it keeps the slice's activations, as
// two signed digits of 8 bits (linear_w8_few.cuh), in its shared memory for good, so nothing but weights is read again, and
// those once. Weights stay bytes, which the integer tensor cores take from shared memory as they arrive.
//
// Two warpgroups take tiles in turn: one multiplies while the other exchanges sums. Every block of a cluster adds up a part of
// each tile's columns: it gets those columns' sums from all blocks in its shared memory, adds them in the order of the
// blocks and stores. A warp of its own requests weights, the first of them while the kernel before still runs.
#pragma once

#include "linear_w8_few.cuh"
#include "wgmma.cuh"

namespace ccq_w8 {

// kRows: 16, 32 or 64.
template <int kRows_, int kC_>
struct ManyConfig {
  static constexpr int kRows = kRows_, kC = kC_, kN = 2 * kRows, kThreads = 2 * 128 + 32;
  static constexpr int kUnits = 2, kStages = 8, kStageBytes = 4 * kUnits * 1024;  // 64 columns, 64 * kUnits rows
  static constexpr int kSlotFloats = 64 * kRows;
  // Of the warps of a block, those whose sums go to one block.
  static constexpr int kWriters = kC >= 4 ? 1 : 4 / kC;
  static constexpr size_t shared_bytes(int k) {
    return size_t{kStages} * kStageBytes + static_cast<size_t>(k / kC) * kN + 2 * kSlotFloats * 4 + kRows * 12 +
           8 * (2 * kStages + 6) + 1024;
  }
};

__device__ inline uint32_t in_block(uint32_t address, int block) {
  uint32_t result;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(result) : "r"(address), "r"(block));
  return result;
}
__device__ inline void store_there(uint32_t address, float v) {
  asm volatile("st.shared::cluster.f32 [%0], %1;\n" ::"r"(address), "f"(v) : "memory");
}
__device__ inline void arrive_there(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
__device__ inline void wait_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t passed;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }\n"
        : "=r"(passed)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!passed);
}
__device__ inline void arrive_cluster() { asm volatile("barrier.cluster.arrive.release;\n" ::: "memory"); }
__device__ inline void await_cluster() { asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory"); }

// Rows of 64 bytes, 64-byte swizzle, 8 rows one behind the other.
__device__ inline uint64_t byte_descriptor(uint32_t shared) {
  return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) | 1ull << 16 | static_cast<uint64_t>(512 >> 4) << 32 | 2ull << 62;
}

#define CCQ_I4(d, i) "+r"(d[i][0]), "+r"(d[i][1]), "+r"(d[i][2]), "+r"(d[i][3])
#define CCQ_I16(d, i) CCQ_I4(d, i), CCQ_I4(d, i + 1), CCQ_I4(d, i + 2), CCQ_I4(d, i + 3)
#define CCQ_BYTES(n, names, a_name, b_name, p_name, ...)                                                               \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " p_name ", 0;\n"                                                       \
               "wgmma.mma_async.sync.aligned.m64n" n "k32.s32.u8.s8 {" names "}, " a_name ", " b_name ", p; }\n"      \
               : __VA_ARGS__                                                                                           \
               : "l"(a), "l"(b), "r"(add))
// d[64 x kN] (+)= a[64 x 32] * b[32 x kN], unsigned by signed bytes.
__device__ inline void multiply_bytes(int (&d)[4][4], uint64_t a, uint64_t b, int add) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  CCQ_BYTES("32", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16", "%17", "%18", CCQ_I16(d, 0));
#endif
}
__device__ inline void multiply_bytes(int (&d)[8][4], uint64_t a, uint64_t b, int add) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  CCQ_BYTES("64", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
            "%27,%28,%29,%30,%31", "%32", "%33", "%34", CCQ_I16(d, 0), CCQ_I16(d, 4));
#endif
}
__device__ inline void multiply_bytes(int (&d)[16][4], uint64_t a, uint64_t b, int add) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  CCQ_BYTES("128", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
            "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,"
            "%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63", "%64", "%65", "%66",
            CCQ_I16(d, 0), CCQ_I16(d, 4), CCQ_I16(d, 8), CCQ_I16(d, 12));
#endif
}
#undef CCQ_I4
#undef CCQ_I16
#undef CCQ_BYTES

// A block's slice of the rows as digits, one warp a row. kPasses: 512 values each.
template <typename C, int kPasses>
__device__ void convert_rows(const ccq_linear_w8_args& a, int first, int k, char* x, float* back, int* offset, int warp) {
  constexpr int kAtOnce = kPasses >= 8 ? 1 : 8 / kPasses;
  const int lane = threadIdx.x % 32, chunks = k / 16;
#pragma unroll 1
  for (int r0 = warp * kAtOnce; r0 < C::kRows; r0 += 8 * kAtOnce) {
    ccq::Chunk kept[kAtOnce][kPasses];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        const int r = r0 + j, c = p * 32 + lane;
        kept[j][p] = ccq::Chunk{};
        if (r < a.rows && c < chunks)
          kept[j][p].load(static_cast<const char*>(a.x) + (static_cast<int64_t>(r) * a.k + first) * 2, c);
      }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int r = r0 + j;
      uint32_t largest = 0;
#pragma unroll
      for (int p = 0; p < kPasses; ++p) largest = max(largest, kept[j][p].largest(CCQ_BF16));
      const ccq::IntegerScale scale(__reduce_max_sync(~0u, largest));
      int sum[2] = {0, 0};
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        const int c = p * 32 + lane;
        if (c >= chunks) continue;
        const PlainDigits digits(kept[j][p], scale.scale);
#pragma unroll
        for (int d = 0; d < 2; ++d) {
          const int n = 2 * r + d;
          *reinterpret_cast<uint4*>(x + c / 4 * (C::kN * 64) + n * 64 + ((c % 4) ^ (n / 2 % 4)) * 16) = digits.bytes[d];
          sum[d] += digits.sum[d];
        }
      }
#pragma unroll
      for (int d = 0; d < 2; ++d) sum[d] = __reduce_add_sync(~0u, sum[d]);
      if (lane == 0) back[r] = scale.back, offset[2 * r] = 128 * sum[0], offset[2 * r + 1] = 128 * sum[1];
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    many(const __grid_constant__ ccq_linear_w8_args a, int clusters) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace ccq;
  constexpr int R = C::kRows, kC = C::kC, kStages = C::kStages;
  extern __shared__ __align__(1024) char raw[];
  char* const shared = raw + (1024 - shared_address(raw) % 1024) % 1024;
  dependents_may_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int rank = blockIdx.x % kC, cluster = blockIdx.x / kC;
  const int k = a.k / kC, first = rank * k, steps = k / 64, all_steps = a.k / 64, tiles = a.n / 64;
  const int begin = static_cast<int>(static_cast<int64_t>(tiles) * cluster / clusters);
  const int end = static_cast<int>(static_cast<int64_t>(tiles) * (cluster + 1) / clusters);
  const int stages_of_tile = (steps + C::kUnits - 1) / C::kUnits;

  char* const x = shared + kStages * C::kStageBytes;
  float* const slots = reinterpret_cast<float*>(x + static_cast<size_t>(k) * C::kN);
  float* const back = slots + 2 * C::kSlotFloats;
  int* const offset = reinterpret_cast<int*>(back + R);
  Barrier* const full = reinterpret_cast<Barrier*>(offset + 2 * R);
  Barrier *const empty = full + kStages, *const sums = empty + kStages, *const free = sums + 2, *const turn = free + 2;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) full[i].init(1), empty[i].init(4);
    for (int i = 0; i < 2; ++i) sums[i].init(kC * C::kWriters), free[i].init(kC), turn[i].init(4);
    publish_barriers();
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  __syncthreads();

  if (warp == 8) {
    arrive_cluster();
    // The weights are nobody's result: they are requested while the kernel before may still run.
    if (lane == 0) {
      const uint64_t policy = streaming_policy();
      int stage = 0;
      uint32_t parity = 1;
      for (int tile = begin; tile < end; ++tile)
        for (int s = 0; s < stages_of_tile; ++s) {
          const int units = min(C::kUnits, steps - s * C::kUnits);
          empty[stage].wait(parity);
          full[stage].arrive_and_expect(4 * units * 1024);
          const char* from = static_cast<const char*>(a.weight) +
                             (static_cast<int64_t>(tile) * 4 * all_steps + first / 64 + s * C::kUnits) * 1024;
          // [unit along K][unit of 16 columns]: what one product takes lies together.
          char* const to = shared + stage * C::kStageBytes;
          for (int u = 0; u < units; ++u)
#pragma unroll
            for (int m = 0; m < 4; ++m)
              bulk_copy(to + (4 * u + m) * 1024, from + (static_cast<int64_t>(m) * all_steps + u) * 1024, 1024, full + stage, policy);
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
    }
    __syncwarp();
    await_cluster();
    arrive_cluster();
    await_cluster();
    return;
  }

  wait_for_prerequisites();
  const int passes = (k + 511) / 512;
  if (passes <= 1) convert_rows<C, 1>(a, first, k, x, back, offset, warp);
  else if (passes <= 2) convert_rows<C, 2>(a, first, k, x, back, offset, warp);
  else if (passes <= 4) convert_rows<C, 4>(a, first, k, x, back, offset, warp);
  else convert_rows<C, 8>(a, first, k, x, back, offset, warp);
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
  arrive_cluster();
  await_cluster();  // all digits, and all barriers of all blocks, are there

  const int group = warp / 4, w = warp % 4;
  const uint32_t ring = shared_address(shared), digits = shared_address(x);
  int stage = group * stages_of_tile % kStages;
  uint32_t parity = group * stages_of_tile / kStages & 1;
  for (int tile = begin + group, round = 0; tile < end; tile += 2, ++round) {
    int d[C::kN / 8][4];
    int before = -1;
    // A stage's barrier tells its last round from the one before alone, so a group begins when the other has got all it needs.
    turn[group].wait(group == 0 ? (round + 1) & 1 : round & 1);
#pragma unroll 1
    for (int s = 0; s < stages_of_tile; ++s) {
      full[stage].wait(parity);
      wgmma_fence();
      const uint32_t weights = ring + stage * C::kStageBytes, values = digits + s * C::kUnits * (C::kN * 64);
#pragma unroll
      for (int u = 0; u < C::kUnits; ++u) {
        if (s * C::kUnits + u >= steps) break;
#pragma unroll
        for (int h = 0; h < 2; ++h)
          multiply_bytes(d, byte_descriptor(weights + u * 4096) + 2 * h, byte_descriptor(values + u * (C::kN * 64)) + 2 * h,
                         s + u + h > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (before >= 0 && lane == 0) empty[before].arrive();
      before = stage;
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    if (lane == 0) turn[group ^ 1].arrive();
    wgmma_wait<0>();
    if (lane == 0) empty[before].arrive();
    // The other group's tile lies between.
    stage += stages_of_tile;
    parity ^= stage / kStages & 1, stage %= kStages;

    // This block's sums go to the blocks that add up their columns: 64 / kC columns each.
    const uint32_t own = shared_address(slots + group * C::kSlotFloats);
    wait_cluster(shared_address(free + group), (round + 1) & 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = 16 * w + 8 * h, to = column * kC / 64;
      const uint32_t there = in_block(own, to) + 4 * (rank * (C::kSlotFloats / kC) + (column - to * (64 / kC) + g));
#pragma unroll
      for (int j = 0; j < C::kN / 8; ++j) {
        const int row = 4 * j + t;
        const float v = fmaf(static_cast<float>(d[j][2 * h] - offset[2 * row]), 256.f,
                             static_cast<float>(d[j][2 * h + 1] - offset[2 * row + 1])) * back[row];
        store_there(there + 4 * row * (64 / kC), v);
      }
    }
    __syncwarp();
    if (lane == 0) {
      const int to = 16 * w * kC / 64;
      arrive_there(in_block(shared_address(sums + group), to));
      if (kC == 8) arrive_there(in_block(shared_address(sums + group), to + 1));
    }
    wait_cluster(shared_address(sums + group), round & 1);
    const float* const from = slots + group * C::kSlotFloats;
    constexpr int kColumns = 64 / kC, kOwn = kColumns * R;
#pragma unroll
    for (int e0 = 0; e0 < kOwn; e0 += 128) {
      const int e = e0 + w * 32 + lane, row = e / kColumns, column = tile * 64 + rank * kColumns + e % kColumns;
      if (e >= kOwn) break;
      float sum = 0.f;
#pragma unroll
      for (int b = 0; b < kC; ++b) sum += from[b * kOwn + e];
      if (row >= a.rows) continue;
      const float scale = __bfloat162float(static_cast<const __nv_bfloat16*>(a.scale)[column]);
      static_cast<__nv_bfloat16*>(a.out)[static_cast<int64_t>(row) * a.n + column] = __float2bfloat16_rn(sum * scale);
    }
    asm volatile("bar.sync %0, 128;\n" ::"r"(group + 1) : "memory");  // all of the group have read
    if (w == 0 && lane < kC) arrive_there(in_block(shared_address(free + group), lane));
  }
  arrive_cluster();
  await_cluster();  // nobody's shared memory is used any more
#endif
}

}  // namespace ccq_w8
