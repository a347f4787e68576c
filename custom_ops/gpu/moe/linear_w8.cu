// SPDX-License-Identifier: Apache-2.0
#include "linear_w8.cuh"
#include "linear_w8_launch.cuh"

#include <algorithm>

namespace ccq_w8 {
namespace {

// Fewer steps a block would spend more on the end of a tile than on its weights.
constexpr int kLeastSteps = 4;

// One kernel: columns and rows of a tile, how deep its ring is, blocks a multiprocessor.
template <int kM, int kN, int kStages, int kBlocks>
struct Kernel {
  static constexpr size_t kShared = Ring<kM, kN, kStages>::kBytes;
  static constexpr size_t kPart = size_t{kWarps} * kM * kN * 4 * 32 * sizeof(float);

  static cudaError_t schedule(int k, int n, StreamK* stream_k) {
    int device = 0, count = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    const int columns = 16 * kM * kWarps, tiles = (n + columns - 1) / columns;
    stream_k->steps = k / kRows;
    stream_k->units = static_cast<int64_t>(tiles) * stream_k->steps;
    stream_k->blocks = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(count * kBlocks, stream_k->units / kLeastSteps)));
    return error;
  }

  static size_t parts(int k, int n) {
    StreamK at{};
    return schedule(k, n, &at) == cudaSuccess ? 2 * kPart * at.blocks : 0;
  }

  static cudaError_t launch(const ccq_linear_w8_args& a, cudaStream_t stream) {
    StreamK at{};
    cudaError_t error = schedule(a.k, a.n, &at);
    auto kernel = product<kM, kN, kStages, kBlocks>;
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kShared));
    if (error != cudaSuccess) return error;
    return ccq::launch_early(kernel, dim3(at.blocks), kThreads, kShared, stream, a, at);
  }
};

template <typename Do>
auto choose(int rows, Do run) {
  if (rows <= 8) return run(Kernel<2, 1, 6, 4>{});
  if (rows <= 16) return run(Kernel<2, 2, 5, 4>{});
  if (rows <= 32) return run(Kernel<4, 4, 3, 3>{});
  return run(Kernel<4, 8, 4, 2>{});
}

// A thread takes 16 bytes: one column, 16 rows of the weight.
__global__ void __launch_bounds__(256)
    dequant(const uint4* weight, const __nv_bfloat16* scale, int k, int first, int64_t count, __nv_bfloat16* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int steps = k / kRows, piece = i % 64, lane = piece % 32;
  const int64_t unit = i / 64, tile = unit / steps;
  const int column = static_cast<int>(tile) * 16 + piece / 32 * 8 + lane / 4;
  const int64_t row = unit % steps * kRows + lane % 4 * 16;
  const float s = __bfloat162float(scale[first + column]);
  const uint4 bytes = weight[static_cast<int64_t>(first / 16) * steps * 64 + i];
  __nv_bfloat162 values[8];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t word = word_of(bytes, w);
    values[2 * w] = __floats2bfloat162_rn(state<0>(word) * s, state<1>(word) * s);
    values[2 * w + 1] = __floats2bfloat162_rn(state<2>(word) * s, state<3>(word) * s);
  }
  auto* target = reinterpret_cast<uint4*>(out + column * static_cast<int64_t>(k) + row);
  const auto* source = reinterpret_cast<const uint4*>(values);
  target[0] = source[0], target[1] = source[1];
}

bool valid(int k, int n) { return k > 0 && k % kRows == 0 && n > 0 && n % 16 == 0; }

}  // namespace
}  // namespace ccq_w8

extern "C" size_t ccq_linear_w8_workspace(int rows, int k, int n) {
  using namespace ccq_w8;
  if (!valid(k, n)) return 0;
  // The largest of the kernels for this and for fewer rows: one workspace serves them all.
  size_t parts = 0;
  for (int r : {8, 16, 32, 64})
    if (r == 8 || r / 2 < rows) parts = std::max(parts, choose(r, [&](auto kernel) { return decltype(kernel)::parts(k, n); }));
  return parts;
}

extern "C" int ccq_linear_w8_counters(int n) {
  const int narrowest = 16 * 2 * ccq_w8::kWarps;
  return (n + narrowest - 1) / narrowest * ccq_w8::kWarps;
}

extern "C" cudaError_t ccq_linear_w8(const ccq_linear_w8_args* args, cudaStream_t stream) {
  using namespace ccq_w8;
  const ccq_linear_w8_args& a = *args;
  if (!valid(a.k, a.n) || a.rows < 0 || a.rows > CCQ_LINEAR_W8_MAX_ROWS) return cudaErrorInvalidValue;
  if (a.rows == 0) return cudaSuccess;
  if (!a.x || !a.weight || !a.scale || !a.out || !a.workspace || !a.counters) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  if (launch_few(a, stream, &error) || launch_many(a, stream, &error)) return error;
  return choose(a.rows, [&](auto kernel) { return decltype(kernel)::launch(a, stream); });
}

extern "C" cudaError_t ccq_dequant_w8(const void* weight, const void* scale, int k, int first, int count, void* out,
                                      cudaStream_t stream) {
  using namespace ccq_w8;
  if (!valid(k, count) || first < 0 || first % 16 || !weight || !scale || !out) return cudaErrorInvalidValue;
  const int64_t pieces = static_cast<int64_t>(count) * k / 16;
  dequant<<<static_cast<unsigned>((pieces + 255) / 256), 256, 0, stream>>>(
      static_cast<const uint4*>(weight), static_cast<const __nv_bfloat16*>(scale), k, first, pieces,
      static_cast<__nv_bfloat16*>(out));
  return cudaGetLastError();
}
