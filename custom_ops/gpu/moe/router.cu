// SPDX-License-Identifier: Apache-2.0
// The router's product: small, and between two products that wait for it, so that only its latency counts.
//
// A cluster of eight thread blocks takes 16 experts and 16 rows; each block has an eighth of K, each of its warps an eighth of
// that. Weights do not depend on the kernel before and are in registers when it ends. A float32 weight is the sum of three
// bfloat16 parts of 8 bits each, so the tensor cores' products are exact. Blocks send their sums to each other (cluster.cuh)
// and each adds up an eighth of the results in the order of the blocks.
#include <cuda_bf16.h>

#include "../common/launch.cuh"
#include "cluster.cuh"
#include "router.h"

namespace ccq_router_kernel {

constexpr int kBlocks = 8, kWarps = 8, kThreads = 32 * kWarps, kTile = 16;

__device__ inline uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

__device__ inline void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 64 values of K of 16 experts, all three parts: [part][row g or g + 8][half of lane t's 16 values].
struct Weights {
  uint4 v[3][2][2];
  __device__ void load(const ccq_router_args& a, int expert, int64_t at) {
#pragma unroll
    for (int part = 0; part < 3; ++part)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const char* row = static_cast<const char*>(a.weight) +
                          ((static_cast<int64_t>(part) * a.experts + expert + 8 * h) * a.k + at) * 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) v[part][h][i] = reinterpret_cast<const uint4*>(row)[i];
      }
  }
};

__global__ void __launch_bounds__(kThreads) router(const __grid_constant__ ccq_router_args a) {
#if CCQ_BULK
  using namespace ccq;
  constexpr int kResults = kTile * kTile;
  __shared__ float sums[kWarps][kResults];
  __shared__ __align__(16) float received[kBlocks][kResults / kBlocks];
  __shared__ Barrier ready;
  dependents_may_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, rank = cluster_rank();
  const int first_expert = blockIdx.x / kBlocks * kTile, first_row = blockIdx.y * kTile;
  if (threadIdx.x == 0) {
    ready.init(1);
    ready.arrive_and_expect(sizeof received);
    publish_barriers();
  }
  // This warp's units of 64 values.
  const int units = a.k / 64, place = rank * kWarps + warp, all = kBlocks * kWarps;
  const int begin = units * place / all, end = units * (place + 1) / all;
  constexpr int kKept = 2;
  Weights kept[kKept];
#pragma unroll
  for (int u = 0; u < kKept; ++u)
    if (begin + u < end) kept[u].load(a, first_expert + g, static_cast<int64_t>(begin + u) * 64 + 16 * t);
  cluster_barrier();  // the barriers of all blocks stand
  wait_for_prerequisites();

  float c[2][4] = {};  // two tiles of 8 rows
  auto add = [&](const Weights& w, int unit) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int row = first_row + 8 * n + g;
      uint4 x[2] = {};
      if (row < a.rows) {
        const char* from = static_cast<const char*>(a.x) + (static_cast<int64_t>(row) * a.k + unit * 64 + 16 * t) * 2;
        x[0] = reinterpret_cast<const uint4*>(from)[0], x[1] = reinterpret_cast<const uint4*>(from)[1];
      }
#pragma unroll
      for (int s = 0; s < 4; ++s)  // four of the lane's values: K in an order of its own, the same for both
#pragma unroll
        for (int part = 2; part >= 0; --part) {
          const uint4 low = w.v[part][0][s / 2], high = w.v[part][1][s / 2];
          const int i = s % 2 * 2;
          multiply(c[n], word_of(low, i), word_of(high, i), word_of(low, i + 1), word_of(high, i + 1), word_of(x[s / 2], i),
                   word_of(x[s / 2], i + 1));
        }
    }
  };
#pragma unroll
  for (int u = 0; u < kKept; ++u)
    if (begin + u < end) add(kept[u], begin + u);
#pragma unroll 1
  for (int unit = begin + kKept; unit < end; ++unit) {
    kept[0].load(a, first_expert + g, static_cast<int64_t>(unit) * 64 + 16 * t);
    add(kept[0], unit);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)  // [row][expert]
      sums[warp][(8 * n + 2 * t + i % 2) * kTile + 8 * (i / 2) + g] = c[n][i];
  __syncthreads();
  if (threadIdx.x < kResults / 4) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 part = reinterpret_cast<const float4*>(sums[w])[threadIdx.x];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    constexpr int kEach = kResults / kBlocks / 4;  // in pieces of four
    const int to = threadIdx.x / kEach;
    store_async(address_in(&received[rank][threadIdx.x % kEach * 4], to), *reinterpret_cast<const uint4*>(&sum),
                address_in(&ready, to));
  }
  if (threadIdx.x >= kResults / kBlocks) return;
  wait_for_cluster(&ready, 0);
  float sum = 0.f;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) sum += received[b][threadIdx.x];
  const int result = rank * (kResults / kBlocks) + threadIdx.x, row = first_row + result / kTile;
  if (row < a.rows) a.out[static_cast<int64_t>(row) * a.experts + first_expert + result % kTile] = sum;
#endif
}

}  // namespace ccq_router_kernel

extern "C" cudaError_t ccq_router(const ccq_router_args* args, cudaStream_t stream) {
  using namespace ccq_router_kernel;
  const ccq_router_args& a = *args;
  if (a.rows < 0 || a.rows > CCQ_ROUTER_MAX_ROWS || a.k <= 0 || a.k % 64 || a.experts <= 0 || a.experts % kTile)
    return cudaErrorInvalidValue;
  if (a.rows == 0) return cudaSuccess;
  if (!a.x || !a.weight || !a.out) return cudaErrorInvalidValue;
  int id = 0, major = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  if (error != cudaSuccess) return error;
  if (major < 9) return cudaErrorNotSupported;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = kBlocks, attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(a.experts / kTile * kBlocks, (a.rows + kTile - 1) / kTile), config.blockDim = dim3(kThreads);
  config.stream = stream, config.attrs = attributes, config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, router, a);
}
