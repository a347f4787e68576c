// SPDX-License-Identifier: Apache-2.0
// Order of the calibrated ccq-2t encoder: for every super scale the search with feedback, the sweeps with their products
// by H, and what is best so far. A launch takes one group of all channels, so that the code in its blocks' metrics is
// small enough for the second-level cache.
#include "trellis_ldlq.h"

#include "trellis_descent.cuh"
#include "trellis_feedback.cuh"

namespace ccq_calibrated_trellis {

constexpr int kPlain = 128;              // threads of the kernels that do little
constexpr int kWide = 256;               // threads of the products
constexpr int kTile = 16, kDepth = 64;   // channels and terms of a product's tile

// grid (16 states, position): previous states are its y.
__global__ void make_tables(Sixteen* tables, const float* roots) {
  const int row = threadIdx.x % 8, tile = threadIdx.x / 8 % 16, previous = blockIdx.x * (blockDim.x / 128) + threadIdx.x / 128;
  Sixteen* table = tables + static_cast<int64_t>(blockIdx.y) * kTable;
  make_words(previous, tile, row, roots + 16 * static_cast<int64_t>(blockIdx.y), table[previous * 16 + tile]);
}

__device__ inline Shared& shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return *reinterpret_cast<Shared*>(dynamic_shared);
}

// m: rows of M of a group or window, `stride` apart. grid (positions).
__global__ void pack_factors(float4* factors, const float* m, int64_t stride) {
  const int row = threadIdx.x, position = blockIdx.x;
  if (row < 4 * position)
    factors[position * kGroup + row] = *reinterpret_cast<const float4*>(m + row * stride + 4 * position);
}

template <typename Search>
__global__ void __launch_bounds__(kThreads, kBlocksEach) search(const __grid_constant__ Plan plan, int group) {
  Search work(plan, shared_memory(), group);
  for (int64_t batch = blockIdx.x; batch < work.batches(); batch += gridDim.x) work.run(batch);
}

// Where the search with feedback begins. One warp a channel.
__global__ void begin(const __grid_constant__ Plan p) {
  const int lane = threadIdx.x % 32;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (channel >= p.n) return;
  for (int64_t r = lane; r < p.k; r += 32) p.x[channel * p.k + r] = p.weight[channel * p.k + r];
  if (lane != 0) return;
  p.kept_count[channel] = 1, p.kept_cost[channel * kStates] = 0, p.kept_state[channel * kStates] = 0;
  p.loss[channel] = 0;
}

// out[c] += in[c] rows for channels with `does`, in the order of the rows; columns from `first` on. in is `stride` apart.
// grid (columns / kWide, channels / kTile).
__global__ void add_rows(float* out, const float* in, int64_t stride, const uint8_t* does, const float* rows, int count,
                         int64_t n, int64_t k, int64_t first) {
  __shared__ float part[kDepth + 4][kTile];
  __shared__ int some;
  const int64_t column = first + static_cast<int64_t>(blockIdx.x) * kWide + threadIdx.x;
  const int64_t channel = static_cast<int64_t>(blockIdx.y) * kTile;
  if (threadIdx.x == 0) {
    some = 0;
    for (int c = 0; c < kTile && channel + c < n; ++c) some |= does[channel + c];
  }
  __syncthreads();
  if (!some) return;
  for (int i = threadIdx.x; i < count * kTile; i += kWide) {
    const int c = i / count, r = i % count;
    part[r][c] = channel + c < n && does[channel + c] ? in[(channel + c) * stride + r] : 0.0f;
  }
  __syncthreads();
  if (column >= k) return;
  float sum[kTile];
#pragma unroll
  for (int c = 0; c < kTile; ++c) sum[c] = channel + c < n ? out[(channel + c) * k + column] : 0.0f;
  for (int r = 0; r < count; ++r) {
    const float factor = rows[r * k + column];
#pragma unroll
    for (int c = 0; c < kTile; ++c) sum[c] = add(sum[c], mul(part[r][c], factor));
  }
#pragma unroll
  for (int c = 0; c < kTile; ++c)
    if (channel + c < n && does[channel + c]) out[(channel + c) * k + column] = sum[c];
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

// out = in H for [n, k]; every sum runs over the rows of H in order. grid (columns / kWide, channels / kTile).
__global__ void times_h(const float* in, const float* h, int64_t n, int64_t k, float* out) {
  __shared__ float part[kDepth][kTile];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWide + threadIdx.x;
  const int64_t channel = static_cast<int64_t>(blockIdx.y) * kTile;
  float sum[kTile];
  for (int c = 0; c < kTile; ++c) sum[c] = 0;
  for (int64_t first = 0; first < k; first += kDepth) {
    for (int i = threadIdx.x; i < kDepth * kTile; i += kWide) {
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

int processors() {
  int device = 0, found = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? found : 0;
}

// Cuts the workspace; without one it only counts. blocks is 0 where the arguments are out of range.
Plan make_plan(const ccq_trellis_ldlq_args& a, void* workspace, size_t* bytes) {
  Plan p{};
  *bytes = 0;
  if (a.n < 1 || a.n > (1 << 19) || a.k < kGroup || a.k % kGroup || a.k > (1 << 17) || a.candidates < 1) return p;
  if (a.window_low > 0 || a.window_high < 0 || a.sweeps < 0 || a.beam < 0 || a.beam > kCostLimit) return p;
  p.n = a.n, p.k = a.k, p.weight = a.weight, p.h = a.h, p.inverse = a.inverse, p.all = a.all, p.windows = a.windows;
  p.nominal = static_cast<float>(a.nominal), p.beam = a.beam, p.step = 256;
  // A scale outside 1 to 15 is never tried.
  p.low = a.window_low > 1 - kScaleMax ? a.window_low : 1 - kScaleMax;
  p.high = a.window_high < kScaleMax - 1 ? a.window_high : kScaleMax - 1;
  const int slots = slots_of(p.high - p.low + 1), fewest = slots < slots_of(kSweepTries) ? slots : slots_of(kSweepTries);
  const int64_t batches = (a.n + fewest - 1) / fewest, blocks = processors() * kBlocksEach;
  p.blocks = static_cast<int>(batches < blocks ? batches : blocks);
  auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<char*>(workspace) + *bytes);
    *bytes += (count * sizeof(*pointer) + 255) / 256 * 256;
  };
  take(p.tables, kWindowBlocks * int64_t{kTable});
  take(p.factors, kWindowBlocks * kGroup);
  take(p.memory, p.blocks);
  take(p.begin, p.blocks * int64_t{slots} * kStates * kGroup);
  take(p.kept_count, a.n);
  take(p.kept_cost, a.n * kStates);
  take(p.kept_state, a.n * kStates);
  take(p.kept_bytes, a.n * kStates);
  take(p.entry, a.n);
  take(p.decides, a.n);
  take(p.stores_zeros, a.n);
  take(p.changes, a.n * kWindowRow);
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
    launch_with(kernel, grid, threads, 0, arguments...);
  }
  template <typename... P, typename... A>
  void launch_with(void (*kernel)(P...), dim3 grid, int threads, size_t shared, A... arguments) {
    if (error_ != cudaSuccess) return;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream_;
    error_ = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  }
  void copy(float* to, const float* from, int64_t count) {
    if (error_ == cudaSuccess) error_ = cudaMemcpyAsync(to, from, count * sizeof(float), cudaMemcpyDeviceToDevice, stream_);
  }
  void product(const Plan& p, const float* in, float* out) {
    launch(times_h, dim3(pieces(p.k, kWide), pieces(p.n, kTile)), kWide, in, p.h, p.n, p.k, out);
  }
  void tables(const Plan& p, const float* roots, const float* m, int64_t stride, int positions) {
    launch(make_tables, dim3(kStates / 2, positions), 256, p.tables, roots);
    launch(pack_factors, positions, static_cast<int>(kGroup), p.factors, m, stride);
  }
  template <typename Search>
  void search_group(const Plan& p, int group) {
    launch_with(search<Search>, p.blocks, kThreads, sizeof(Shared), p, group);
  }
  template <typename Search>
  void allow_shared() {
    if (error_ == cudaSuccess)
      error_ = cudaFuncSetAttribute(search<Search>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  }
  void add(const Plan& p, float* out, const float* in, int64_t stride, const uint8_t* does, const float* rows, int count,
           int64_t first) {
    if (first >= p.k) return;
    launch(add_rows, dim3(pieces(p.k - first, kWide), pieces(p.n, kTile)), kWide, out, in, stride, does, rows, count, p.n,
           p.k, first);
  }
  // All groups, each fed with the errors before it.
  void feed_back(const Plan& p) {
    launch(begin, pieces(p.n * 32, kPlain), kPlain, p);
    for (int64_t g = 0; g < p.k / kGroup; ++g) {
      const int64_t first = g * kGroup;
      tables(p, p.all.root + 16 * (first / 4), p.all.m + first * p.k + first, p.k, kPositions);
      search_group<FeedBack>(p, static_cast<int>(g));
      // What the next group is asked its survivors know already.
      if (g) add(p, p.x, p.changes, kWindowRow, p.decides, p.all.m + (first - kGroup) * p.k, kGroup, first + kGroup);
      add(p, p.x, p.weight + first, p.k, p.stores_zeros, p.all.m + first * p.k, kGroup, first + kGroup);
    }
  }
  // All groups anew, each with all others fixed.
  void descend(const Plan& p) {
    for (int64_t g = 0; g < p.k / kGroup; ++g) {
      const int rows = g + 1 == p.k / kGroup ? kGroup : kWindowRows;
      tables(p, p.windows.root + 16 * kWindowBlocks * g, p.windows.m + g * kWindowRows * kWindowRows, kWindowRows,
             rows / 4);
      search_group<Descent>(p, static_cast<int>(g));
      add(p, p.gradient, p.changes, kWindowRow, p.decides, p.h + g * kGroup * p.k, rows, 0);
    }
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
  Queue queue(stream);
  queue.allow_shared<FeedBack>();
  queue.allow_shared<Descent>();
  if (a.sweeps) queue.product(p, p.weight, p.target);
  for (int j = 0; j < a.candidates; ++j) {
    queue.copy(p.super, a.supers + j * p.n, p.n);
    queue.feed_back(p);
    if (a.sweeps) {
      queue.measure(p);
      for (int sweep = 0; sweep < a.sweeps; ++sweep) {
        queue.descend(p);
        queue.launch(refit, pieces(p.n, kPlain), kPlain, p);
        queue.measure(p);
      }
      queue.launch(measure_loss, pieces(p.n, kPlain), kPlain, p);
    }
    queue.launch(take_better, pieces(p.n * 32, kPlain), kPlain, p, j == 0, a.words, a.scales, a.found_supers, a.loss);
  }
  return queue.error();
}
