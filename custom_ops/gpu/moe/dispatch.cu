// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include "half8.cuh"
#include "../common/launch.cuh"

namespace {

constexpr int kThreads = 256;

// One block an expert: its first row is the number of choices of smaller experts, its rows follow in order.
template <int kSize>
__global__ void __launch_bounds__(kSize) route(const int64_t* ids, int count, int experts, int64_t* offsets,
                                               int32_t* place) {
  constexpr int kWarps = kSize / 32;
  __shared__ int warp_sums[kWarps];
  const int64_t expert = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int smaller = 0;
  for (int i = threadIdx.x; i < count; i += kSize) {
    const int64_t id = ids[i];
    smaller += id >= 0 && id < expert;
    if (expert == 0 && (id < 0 || id >= experts)) place[i] = -1;
  }
  smaller = __reduce_add_sync(0xFFFFFFFFu, smaller);
  if (lane == 0) warp_sums[warp] = smaller;
  __syncthreads();
  int next = 0;
  for (int w = 0; w < kWarps; ++w) next += warp_sums[w];
  for (int start = 0; start < count; start += kSize) {
    const int i = start + threadIdx.x;
    const bool mine = i < count && ids[i] == expert;
    const unsigned votes = __ballot_sync(0xFFFFFFFFu, mine);
    __syncthreads();
    if (lane == 0) warp_sums[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1)), total = 0;
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? warp_sums[w] : 0;
      total += warp_sums[w];
    }
    if (mine) place[i] = next + before;
    next += total;
  }
  if (threadIdx.x == 0) offsets[expert] = next;
}

// One block a choice; the row is read once from memory and top_k - 1 times from the cache.
__global__ void __launch_bounds__(kThreads) gather(const uint4* x, const int32_t* place, int top_k, int vectors,
                                                   uint4* rows) {
  const int32_t row = place[blockIdx.x];
  if (row < 0) return;
  const uint4* from = x + static_cast<int64_t>(blockIdx.x / top_k) * vectors;
  uint4* to = rows + static_cast<int64_t>(row) * vectors;
#pragma unroll 4
  for (int i = threadIdx.x; i < vectors; i += kThreads) to[i] = __ldg(from + i);
}

// Both in one launch for at most kThreads choices, the same result: one block a choice finds its row by looking at all of
// them, one thread each; the first block counts the rows of every expert.
__global__ void __launch_bounds__(kThreads) route_and_gather(const int64_t* ids, const uint4* x, int count, int top_k,
                                                             int experts, int vectors, int64_t* offsets, int32_t* place,
                                                             uint4* rows) {
  constexpr int kKept = 4;  // vectors that a thread reads before it knows where they go: their latencies do not add up
  __shared__ int64_t all[kThreads];
  ccq::dependents_may_start();
  ccq::wait_for_prerequisites();
  const int me = blockIdx.x, i = threadIdx.x;
  const int64_t id = i < count ? ids[i] : -1;
  const uint4* from = x + static_cast<int64_t>(me / top_k) * vectors;
  uint4 kept[kKept];
#pragma unroll
  for (int v = 0; v < kKept; ++v)
    if (i + v * kThreads < vectors) kept[v] = from[i + v * kThreads];
  all[i] = id;
  const int64_t mine = ids[me];
  const int row = __syncthreads_count(id >= 0 && (id < mine || (id == mine && i < me)));
  const bool known = mine >= 0 && mine < experts;
  if (i == 0) place[me] = known ? row : -1;
  if (me == 0) {
    for (int expert = i; expert < experts; expert += kThreads) {
      int64_t end = 0;
      for (int j = 0; j < count; ++j) end += all[j] >= 0 && all[j] <= expert;
      offsets[expert] = end;
    }
  }
  if (!known) return;
  uint4* to = rows + static_cast<int64_t>(row) * vectors;
#pragma unroll
  for (int v = 0; v < kKept; ++v)
    if (i + v * kThreads < vectors) to[i + v * kThreads] = kept[v];
  for (int v = i + kKept * kThreads; v < vectors; v += kThreads) to[v] = from[v];
}

template <int kDtype>
__global__ void __launch_bounds__(kThreads) combine(const uint4* rows, const int32_t* place, const float* weights,
                                                    int top_k, int vectors, uint4* out) {
  constexpr int kAtOnce = 8;  // rows that a thread reads at once
  const int64_t token = blockIdx.x;
  const int i = blockIdx.y * kThreads + threadIdx.x;
  ccq::dependents_may_start();
  ccq::wait_for_prerequisites();
  if (i >= vectors) return;
  float sum[8] = {};
  for (int first = 0; first < top_k; first += kAtOnce) {
    int32_t row[kAtOnce];
    float weight[kAtOnce];
    uint4 part[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const bool there = first + j < top_k;
      row[j] = there ? place[token * top_k + first + j] : -1;
      weight[j] = there ? weights[token * top_k + first + j] : 0.f;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (row[j] >= 0) part[j] = rows[static_cast<int64_t>(row[j]) * vectors + i];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (row[j] < 0) continue;
      float value[8];
      ccq_half8::unpack<kDtype>(part[j], value);
#pragma unroll
      for (int v = 0; v < 8; ++v) sum[v] = fmaf(weight[j], value[v], sum[v]);
    }
  }
  out[token * vectors + i] = ccq_half8::pack<kDtype>(sum);
}

bool sizes_fit(int tokens, int top_k, int hidden) {
  return tokens >= 0 && top_k >= 1 && top_k <= 64 && hidden >= 8 && hidden % 8 == 0 && tokens <= 2147483647 / top_k;
}

}  // namespace

extern "C" cudaError_t ccq_moe_dispatch(const int64_t* ids, const void* x, int tokens, int top_k, int experts,
                                        int hidden, int64_t* offsets, int32_t* place, void* rows, cudaStream_t stream) {
  if (!sizes_fit(tokens, top_k, hidden) || experts < 1 || experts > 1024) return cudaErrorInvalidValue;
  if (tokens > 0 && tokens * top_k <= kThreads) {
    return ccq::launch_early(route_and_gather, tokens * top_k, kThreads, 0, stream, ids, static_cast<const uint4*>(x),
                             tokens * top_k, top_k, experts, hidden / 8, offsets, place, static_cast<uint4*>(rows));
  }
  constexpr int kMany = 1024;  // threads that look at the choices of many tokens
  auto routing = tokens * top_k > 8 * kMany ? route<kMany> : route<kThreads>;
  routing<<<experts, tokens * top_k > 8 * kMany ? kMany : kThreads, 0, stream>>>(ids, tokens * top_k, experts, offsets,
                                                                                 place);
  if (tokens > 0)
    gather<<<tokens * top_k, kThreads, 0, stream>>>(static_cast<const uint4*>(x), place, top_k, hidden / 8,
                                                    static_cast<uint4*>(rows));
  return cudaGetLastError();
}

extern "C" cudaError_t ccq_moe_combine(const void* rows, const int32_t* place, const float* weights, int tokens,
                                       int top_k, int hidden, int dtype, void* out, cudaStream_t stream) {
  if (!sizes_fit(tokens, top_k, hidden) || (dtype != CCQ_BF16 && dtype != CCQ_FP16)) return cudaErrorInvalidValue;
  if (tokens == 0) return cudaSuccess;
  const int vectors = hidden / 8;
  const dim3 grid(tokens, (vectors + kThreads - 1) / kThreads);
  auto launch = dtype == CCQ_BF16 ? combine<CCQ_BF16> : combine<CCQ_FP16>;
  return ccq::launch_early(launch, grid, kThreads, 0, stream, static_cast<const uint4*>(rows), place, weights, top_k,
                           vectors, static_cast<uint4*>(out));
}
