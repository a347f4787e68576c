// SPDX-License-Identifier: Apache-2.0
#include "activation.h"

#include "half8.cuh"
#include "../common/launch.cuh"

namespace {

constexpr int kThreads = 256;

// kEach vectors for each thread, a block's width apart, all of them read before the first is written. Indices of vectors have 32
// bits: a division of 64 takes longer than the memory does.
template <int kDtype, int kEach>
__global__ void __launch_bounds__(kThreads) swiglu(const uint4* x, uint4* out, uint32_t vectors, uint32_t per_row) {
  ccq::dependents_may_start();
  ccq::wait_for_prerequisites();
  const uint32_t first = blockIdx.x * (kThreads * kEach) + threadIdx.x;
  uint4 gates[kEach], ups[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const uint32_t i = first + e * kThreads;
    if (i >= vectors) break;
    const uint4* const from = x + (static_cast<uint64_t>(i / per_row) * per_row + i);
    gates[e] = from[0], ups[e] = from[per_row];
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const uint32_t i = first + e * kThreads;
    if (i >= vectors) break;
    float gate[8], up[8];
    ccq_half8::unpack<kDtype>(gates[e], gate);
    ccq_half8::unpack<kDtype>(ups[e], up);
#pragma unroll
    for (int j = 0; j < 8; ++j) gate[j] = gate[j] / (1.0f + __expf(-gate[j])) * up[j];
    out[i] = ccq_half8::pack<kDtype>(gate);
  }
}

constexpr int64_t kManyVectors = 1 << 20;  // enough blocks with several vectors a thread

template <int kEach>
cudaError_t launch(const void* x, void* out, int64_t vectors, int per_row, int dtype, cudaStream_t stream) {
  const int64_t blocks = (vectors + kThreads * kEach - 1) / (kThreads * kEach);
  auto kernel = dtype == CCQ_BF16 ? swiglu<CCQ_BF16, kEach> : swiglu<CCQ_FP16, kEach>;
  return ccq::launch_early(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, static_cast<const uint4*>(x),
                           static_cast<uint4*>(out), static_cast<uint32_t>(vectors), static_cast<uint32_t>(per_row));
}

}  // namespace

extern "C" cudaError_t ccq_swiglu(const void* x, void* out, int rows, int width, int dtype, cudaStream_t stream) {
  if (rows < 0 || width < 8 || width % 8 || (dtype != CCQ_BF16 && dtype != CCQ_FP16)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const int64_t vectors = static_cast<int64_t>(rows) * (width / 8);
  if (vectors > 4294967295 - 2 * kThreads) return cudaErrorInvalidValue;
  return vectors < kManyVectors ? launch<1>(x, out, vectors, width / 8, dtype, stream)
                                : launch<2>(x, out, vectors, width / 8, dtype, stream);
}
