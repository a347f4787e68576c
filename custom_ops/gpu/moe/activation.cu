// SPDX-License-Identifier: Apache-2.0
#include "activation.h"

#include "half8.cuh"
#include "../common/launch.cuh"

namespace {

constexpr int kThreads = 256;

template <int kDtype>
__global__ void __launch_bounds__(kThreads) swiglu(const uint4* x, uint4* out, int64_t vectors, int per_row) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  ccq::dependents_may_start();
  ccq::wait_for_prerequisites();
  if (i >= vectors) return;
  const int64_t row = i / per_row, column = i % per_row;
  float gate[8], up[8];
  ccq_half8::unpack<kDtype>(x[row * 2 * per_row + column], gate);
  ccq_half8::unpack<kDtype>(x[row * 2 * per_row + per_row + column], up);
#pragma unroll
  for (int j = 0; j < 8; ++j) gate[j] = gate[j] / (1.0f + __expf(-gate[j])) * up[j];
  out[i] = ccq_half8::pack<kDtype>(gate);
}

}  // namespace

extern "C" cudaError_t ccq_swiglu(const void* x, void* out, int rows, int width, int dtype, cudaStream_t stream) {
  if (rows < 0 || width < 8 || width % 8 || (dtype != CCQ_BF16 && dtype != CCQ_FP16)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const int64_t vectors = static_cast<int64_t>(rows) * (width / 8), blocks = (vectors + kThreads - 1) / kThreads;
  if (blocks > 2147483647) return cudaErrorInvalidValue;
  auto launch = dtype == CCQ_BF16 ? swiglu<CCQ_BF16> : swiglu<CCQ_FP16>;
  return ccq::launch_early(launch, static_cast<unsigned>(blocks), kThreads, 0, stream, static_cast<const uint4*>(x),
                           static_cast<uint4*>(out), vectors, width / 8);
}
