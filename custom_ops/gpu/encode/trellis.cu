// SPDX-License-Identifier: Apache-2.0
// Order of the ccq-2t encoder: the code's table, super scales, the search of all jobs, the best super scale of each channel.
#include "trellis.h"

#include "trellis_block.cuh"

namespace ccq_trellis_kernel {

constexpr int kBlocksEach = 2;  // blocks a multiprocessor: 128 registers a thread, 69 KB of shared memory
constexpr int kPlain = 128;     // threads of the kernels that do little
// Below this a super scale's reciprocal would leave float32 (encode.cuh).
constexpr float kSmallestSuper = 7.9e-31f;

__global__ void make_table(uint4* table) {
  table[blockIdx.x * kThreads + threadIdx.x] = table_entry(blockIdx.x, threadIdx.x);
}

// All float sums run in order, in one thread, with single IEEE operations: the CPU's order.
__global__ void measure_groups(const __grid_constant__ Plan p) {
  const int64_t groups = p.k / kGroup, at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= p.n * groups) return;
  const float4* w = reinterpret_cast<const float4*>(p.weight + at * kGroup);
  double sum = 0;
  for (int i = 0; i < kGroup / 4; ++i) {
    const float4 q = w[i];
    const double x[4] = {q.x, q.y, q.z, q.w};
    for (int j = 0; j < 4; ++j) sum = __dadd_rn(sum, __dmul_rn(x[j], x[j]));
  }
  p.energies[at] = sum;
}

__device__ inline float to_bfloat16(double value) {
  uint32_t bits = __float_as_uint(static_cast<float>(value));
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  return __uint_as_float(bits);
}

struct Kappas {
  double value[CCQ_TRELLIS_KAPPAS];
};

// sums[n][0] and the super scales to try.
__global__ void choose_supers(const __grid_constant__ Plan p, const __grid_constant__ Kappas kappas, double* sums) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, groups = p.k / kGroup;
  if (channel >= p.n) return;
  double total = 0;
  for (int64_t g = 0; g < groups; ++g) total = __dadd_rn(total, p.energies[channel * groups + g]);
  sums[3 * channel] = total;
  const double rms = __dsqrt_rn(__ddiv_rn(total, static_cast<double>(groups) * kGroup));
  float* supers = p.supers + channel * p.kappas;
  for (int i = 0; i < p.kappas; ++i) {
    const float super = to_bfloat16(__ddiv_rn(__dmul_rn(p.nominal, rms), kappas.value[i]));
    bool fresh = super >= kSmallestSuper;
    for (int j = 0; j < i; ++j) fresh = fresh && supers[j] != super;
    supers[i] = fresh ? super : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksEach) search(const __grid_constant__ Plan plan) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  Block block(plan, *reinterpret_cast<Shared*>(dynamic_shared));
  for (int64_t batch = blockIdx.x; batch < block.batches(); batch += gridDim.x) block.run(batch);
}

// The best super scale of a channel: the one with the largest gain, the first among equals. One warp a channel.
__global__ void finish(const __grid_constant__ Plan p, uint8_t* words, uint8_t* scales, float* supers, double* sums) {
  const int lane = threadIdx.x % 32;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32, groups = p.k / kGroup;
  if (channel >= p.n) return;
  int64_t best = -1;
  double most = 0;
  for (int i = 0; i < p.kappas; ++i) {
    const double super = p.supers[channel * p.kappas + i];
    if (super == 0) continue;
    const double gain = __dmul_rn(__dmul_rn(super, super), static_cast<double>(-p.values[channel * p.kappas + i]));
    if (best < 0 || gain > most) best = channel * p.kappas + i, most = gain;
  }
  words += channel * (p.k / 4), scales += channel * groups;
  for (int64_t i = lane; i < p.k / 4; i += 32) words[i] = best < 0 ? 0 : p.words[best * (p.k / 4) + i];
  for (int64_t g = lane; g < groups; g += 32) scales[g] = best < 0 ? 0 : p.scales[best * groups + g];
  __syncwarp();
  if (lane != 0) return;
  const float super = best < 0 ? 0.0f : p.supers[best];
  supers[channel] = super;
  // The error as the decoder will see it.
  double cross = 0, decoded = 0;
  int before = 0;
  const float4* weight = reinterpret_cast<const float4*>(p.weight + channel * p.k);
  for (int64_t i = 0; i < p.k / 4; ++i) {
    const float scale = __fmul_rn(static_cast<float>(scales[i / kPositions]), super);
    int v[4];
    word_values(before << 8 | words[i], v);
    before = words[i];
    const float4 q = weight[i];
    const double w[4] = {q.x, q.y, q.z, q.w};
    for (int d = 0; d < 4; ++d) {
      const double value = __fmul_rn(static_cast<float>(v[d]), scale);
      cross = __dadd_rn(cross, __dmul_rn(w[d], value));
      decoded = __dadd_rn(decoded, __dmul_rn(value, value));
    }
  }
  sums[3 * channel + 1] = cross;
  sums[3 * channel + 2] = decoded;
}

int resident_blocks() {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return processors * kBlocksEach;
}

// Cuts the workspace; without one it only counts. blocks is 0 where the arguments are out of range.
Plan make_plan(const ccq_trellis_args& a, void* workspace, size_t* bytes) {
  Plan p{};
  *bytes = 0;
  const int tries = a.window_high - a.window_low + 1;
  if (a.n < 1 || a.n > (int64_t{1} << 24) || a.k < kGroup || a.k % kGroup || a.k > (int64_t{1} << 20)) return p;
  if (a.kappa_count < 1 || a.kappa_count > CCQ_TRELLIS_KAPPAS || tries < 1 || tries > CCQ_TRELLIS_TRIES) return p;
  if (a.beam < 0 || a.beam > CCQ_TRELLIS_BEAM) return p;
  const int64_t groups = a.k / kGroup, jobs = a.n * a.kappa_count, each = block_costs(groups, tries) * 2;
  const int64_t batches = (jobs + kColumns / tries - 1) / (kColumns / tries), fitting = a.run_bytes / each;
  int64_t blocks = resident_blocks();
  if (blocks > batches) blocks = batches;
  if (blocks > fitting) blocks = fitting;
  if (blocks < 1) return p;
  p.weight = a.weight, p.n = a.n, p.k = a.k, p.kappas = a.kappa_count, p.low = a.window_low, p.tries = tries;
  p.beam = a.beam, p.blocks = static_cast<int>(blocks), p.nominal = a.nominal;
  auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<char*>(workspace) + *bytes);
    *bytes += (count * sizeof(*pointer) + 255) / 256 * 256;
  };
  take(p.table, kStates * kThreads);
  take(p.energies, a.n * groups);
  take(p.supers, jobs);
  take(p.values, jobs);
  take(p.words, jobs * (a.k / 4));
  take(p.scales, jobs * groups);
  take(p.ends, jobs * groups);
  take(p.costs, blocks * block_costs(groups, tries));
  return p;
}

unsigned pieces(int64_t count, int64_t size) { return static_cast<unsigned>((count + size - 1) / size); }

template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), unsigned blocks, int threads, size_t shared, cudaStream_t stream, A... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

}  // namespace ccq_trellis_kernel

using namespace ccq_trellis_kernel;

extern "C" size_t ccq_trellis_workspace(const ccq_trellis_args* args) {
  size_t bytes;
  make_plan(*args, nullptr, &bytes);
  return bytes;
}

extern "C" cudaError_t ccq_trellis(const ccq_trellis_args* args, cudaStream_t stream) {
  size_t bytes;
  const Plan plan = make_plan(*args, args->workspace, &bytes);
  if (plan.blocks == 0) return cudaErrorInvalidValue;
  Kappas kappas{};
  for (int i = 0; i < plan.kappas; ++i) kappas.value[i] = args->kappas[i];
  cudaError_t error = cudaFuncSetAttribute(search, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error == cudaSuccess) error = launch(make_table, kStates, kThreads, 0, stream, plan.table);
  if (error == cudaSuccess)
    error = launch(measure_groups, pieces(plan.n * (plan.k / kGroup), kPlain), kPlain, 0, stream, plan);
  if (error == cudaSuccess)
    error = launch(choose_supers, pieces(plan.n, kPlain), kPlain, 0, stream, plan, kappas, args->sums);
  if (error == cudaSuccess) error = launch(search, plan.blocks, kThreads, sizeof(Shared), stream, plan);
  if (error == cudaSuccess)
    error = launch(finish, pieces(plan.n * 32, kPlain), kPlain, 0, stream, plan, args->words, args->scales, args->supers,
                   args->sums);
  return error;
}
