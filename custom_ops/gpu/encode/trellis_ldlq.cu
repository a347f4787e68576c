// SPDX-License-Identifier: Apache-2.0
// Order of the calibrated ccq-2t encoder: tables of the code in every block's metric; then, for every super scale, the
// search with feedback, the sweeps with their products by H, and what is best so far.
#include "trellis_ldlq.h"

#include "trellis_channel.cuh"

namespace ccq_calibrated_trellis {

constexpr int kBlocksEach = 3;           // blocks a multiprocessor
constexpr int kPlain = 128;              // threads of the kernels that do little
constexpr int kTile = 16, kDepth = 64;   // channels and terms of a product's tile

__global__ void make_tables(uint2* tables, const float* roots) {
  const int word = blockIdx.x * kThreads + threadIdx.x;
  tables[(static_cast<int64_t>(blockIdx.y) << 16) + word] = word_in_metric(word, roots + 16 * static_cast<int64_t>(blockIdx.y));
}

template <bool kDescend>
__global__ void __launch_bounds__(kThreads, kBlocksEach) search(const __grid_constant__ Plan plan) {
  __shared__ ChannelShared shared;
  for (int64_t channel = blockIdx.x; channel < plan.n; channel += gridDim.x) {
    Channel work(plan, shared, channel);
    if constexpr (kDescend) work.descend();
    else work.feed_back();
    __syncthreads();
  }
}

// error = w - w'. One thread for four weights.
__global__ void measure_errors(const __grid_constant__ Plan p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, bytes = p.k / 4;
  if (at >= p.n * bytes) return;
  const int64_t channel = at / bytes, i = at % bytes;
  const int before = i ? p.words[at - 1] : 0;
  const float scale = mul(static_cast<float>(p.scales[channel * (p.k / kGroup) + i / kPositions]), p.super[channel]);
  int v[4];
  word_values(before << 8 | p.words[at], v);
  for (int d = 0; d < 4; ++d)
    p.error[4 * at + d] = sub(p.weight[4 * at + d], mul(scale, static_cast<float>(v[d])));
}

// out = in H for [n, k]; every sum runs over the rows of H in order. grid (columns / kThreads, channels / kTile).
__global__ void times_h(const float* in, const float* h, int64_t n, int64_t k, float* out) {
  __shared__ float part[kDepth][kTile];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t channel = static_cast<int64_t>(blockIdx.y) * kTile;
  float sum[kTile];
  for (int c = 0; c < kTile; ++c) sum[c] = 0;
  for (int64_t first = 0; first < k; first += kDepth) {
    for (int i = threadIdx.x; i < kDepth * kTile; i += kThreads) {
      const int c = i / kDepth, r = i % kDepth;
      part[r][c] = channel + c < n ? in[(channel + c) * k + first + r] : 0.0f;
    }
    __syncthreads();
    if (column < k)
      for (int r = 0; r < kDepth; ++r) {
        const float factor = h[(first + r) * k + column];
#pragma unroll
        for (int c = 0; c < kTile; ++c) sum[c] = add(sum[c], mul(part[r][c], factor));
      }
    __syncthreads();
  }
  if (column < k)
    for (int c = 0; c < kTile && channel + c < n; ++c) out[(channel + c) * k + column] = sum[c];
}

__device__ inline float to_bfloat16(float value) {
  uint32_t bits = __float_as_uint(value);
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  return __uint_as_float(bits);
}

// The best factor on w' = w - e is 1 + (w' H e) / (w' H w').
__global__ void refit(const __grid_constant__ Plan p) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= p.n) return;
  const float *w = p.weight + channel * p.k, *e = p.error + channel * p.k;
  const float *g = p.gradient + channel * p.k, *hw = p.target + channel * p.k;
  float cross = 0, norm = 0;
  for (int64_t r = 0; r < p.k; ++r) {
    const float decoded = sub(w[r], e[r]);
    cross = add(cross, mul(decoded, g[r]));
    norm = add(norm, mul(decoded, sub(hw[r], g[r])));
  }
  const float old = p.super[channel];
  const float fitted = to_bfloat16(add(old, mul(old, __fdiv_rn(cross, norm))));
  const float t = sub(__fdiv_rn(fitted, old), 1.0f);
  if (norm > 0.0f && fitted > 0.0f && mul(t, sub(mul(t, norm), mul(2.0f, cross))) < 0.0f) p.super[channel] = fitted;
}

__global__ void measure_loss(const __grid_constant__ Plan p) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= p.n) return;
  double sum = 0;
  for (int64_t r = channel * p.k; r < (channel + 1) * p.k; ++r)
    sum = __dadd_rn(sum, __dmul_rn(static_cast<double>(p.error[r]), static_cast<double>(p.gradient[r])));
  p.loss[channel] = sum;
}

// A channel's result becomes its best one, if it is. One warp a channel.
__global__ void take_better(const __grid_constant__ Plan p, bool first, uint8_t* words, uint8_t* scales, float* supers,
                            double* loss) {
  const int lane = threadIdx.x % 32;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32, groups = p.k / kGroup;
  if (channel >= p.n) return;
  const bool better = first || p.loss[channel] < loss[channel];
  __syncwarp();
  if (!better) return;
  for (int64_t i = lane; i < p.k / 4; i += 32) words[channel * (p.k / 4) + i] = p.words[channel * (p.k / 4) + i];
  for (int64_t g = lane; g < groups; g += 32) scales[channel * groups + g] = p.scales[channel * groups + g];
  if (lane == 0) supers[channel] = p.super[channel], loss[channel] = p.loss[channel];
}

int resident_blocks() {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return processors * kBlocksEach;
}

// Cuts the workspace; without one it only counts. blocks is 0 where the arguments are out of range.
Plan make_plan(const ccq_trellis_ldlq_args& a, void* workspace, size_t* bytes) {
  Plan p{};
  *bytes = 0;
  if (a.n < 1 || a.n > (1 << 19) || a.k < kGroup || a.k % kGroup || a.k > (1 << 17) || a.candidates < 1) return p;
  if (a.window_low > 0 || a.window_high < 0 || a.sweeps < 0 || a.beam < 0 || a.beam > kCostLimit) return p;
  const int blocks = resident_blocks();
  p.n = a.n, p.k = a.k, p.weight = a.weight, p.h = a.h, p.inverse = a.inverse, p.all = a.all, p.windows = a.windows;
  p.nominal = static_cast<float>(a.nominal), p.low = a.window_low, p.high = a.window_high, p.beam = a.beam;
  p.blocks = a.n < blocks ? static_cast<int>(a.n) : blocks;
  auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<char*>(workspace) + *bytes);
    *bytes += (count * sizeof(*pointer) + 255) / 256 * 256;
  };
  take(p.tables, (a.k / 4) << 16);
  if (a.sweeps) take(p.window_tables, (a.k / kGroup * kWindowBlocks) << 16);
  take(p.memory, p.blocks * kBlockBytes);
  take(p.x, a.n * a.k);
  if (a.sweeps) take(p.error, a.n * a.k), take(p.gradient, a.n * a.k), take(p.target, a.n * a.k);
  take(p.super, a.n);
  take(p.words, a.n * (a.k / 4));
  take(p.scales, a.n * (a.k / kGroup));
  take(p.loss, a.n);
  return p;
}

unsigned pieces(int64_t count, int64_t size) { return static_cast<unsigned>((count + size - 1) / size); }

// Launches on one stream; the first error sticks and makes the rest no-ops.
class Queue {
 public:
  explicit Queue(cudaStream_t stream) : stream_(stream) {}
  cudaError_t error() const { return error_; }

  template <typename... P, typename... A>
  void launch(void (*kernel)(P...), dim3 grid, int threads, A... arguments) {
    if (error_ != cudaSuccess) return;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.stream = stream_;
    error_ = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  }
  void copy(float* to, const float* from, int64_t count) {
    if (error_ == cudaSuccess) error_ = cudaMemcpyAsync(to, from, count * sizeof(float), cudaMemcpyDeviceToDevice, stream_);
  }
  void product(const Plan& p, const float* in, float* out) {
    launch(times_h, dim3(pieces(p.k, kThreads), pieces(p.n, kTile)), kThreads, in, p.h, p.n, p.k, out);
  }
  // error, and gradient from it.
  void measure(const Plan& p) {
    launch(measure_errors, pieces(p.n * (p.k / 4), kPlain), kPlain, p);
    product(p, p.error, p.gradient);
  }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace ccq_calibrated_trellis

using namespace ccq_calibrated_trellis;

extern "C" size_t ccq_trellis_ldlq_workspace(const ccq_trellis_ldlq_args* args) {
  size_t bytes;
  const Plan plan = make_plan(*args, nullptr, &bytes);
  return plan.blocks ? bytes : 0;
}

extern "C" cudaError_t ccq_trellis_ldlq(const ccq_trellis_ldlq_args* args, cudaStream_t stream) {
  const ccq_trellis_ldlq_args& a = *args;
  size_t bytes;
  const Plan p = make_plan(a, a.workspace, &bytes);
  if (p.blocks == 0) return cudaErrorInvalidValue;
  const int64_t groups = p.k / kGroup;
  Queue queue(stream);
  queue.launch(make_tables, dim3(kStates, static_cast<unsigned>(p.k / 4)), kThreads, p.tables, p.all.root);
  if (a.sweeps) {
    queue.launch(make_tables, dim3(kStates, static_cast<unsigned>(groups * kWindowBlocks)), kThreads, p.window_tables,
                 p.windows.root);
    queue.product(p, p.weight, p.target);
  }
  for (int j = 0; j < a.candidates; ++j) {
    queue.copy(p.super, a.supers + j * p.n, p.n);
    queue.launch(search<false>, p.blocks, kThreads, p);
    if (a.sweeps) {
      queue.measure(p);
      for (int sweep = 0; sweep < a.sweeps; ++sweep) {
        queue.launch(search<true>, p.blocks, kThreads, p);
        queue.launch(refit, pieces(p.n, kPlain), kPlain, p);
        queue.measure(p);
      }
      queue.launch(measure_loss, pieces(p.n, kPlain), kPlain, p);
    }
    queue.launch(take_better, pieces(p.n * 32, kPlain), kPlain, p, j == 0, a.words, a.scales, a.found_supers, a.loss);
  }
  return queue.error();
}
