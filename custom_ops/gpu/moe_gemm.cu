// SPDX-License-Identifier: Apache-2.0
// Choice of kernel, workspace and launch of the grouped GEMM (moe_gemm.h).

#include "moe_gemm.h"

#include <algorithm>
#include <atomic>

#include "moe_gemm.cuh"

namespace ccq {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kMaxExperts = 1024;

struct Device {
  int id, sms, major;
};

cudaError_t current_device(Device* device) {
  static std::atomic<int> cache[kMaxDevices];  // sms << 8 | major, 0: not asked yet
  cudaError_t error = cudaGetDevice(&device->id);
  if (error != cudaSuccess) return error;
  int known = device->id < kMaxDevices ? cache[device->id].load() : 0;
  if (known == 0) {
    int sms = 0, major = 0;
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device->id);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device->id);
    if (error != cudaSuccess) return error;
    known = sms << 8 | major;
    if (device->id < kMaxDevices) cache[device->id].store(known);
  }
  device->sms = known >> 8, device->major = known & 255;
  return cudaSuccess;
}

// The workspace's parts, each on a 256-byte border.
struct Layout {
  size_t x, sums, row_scale, tickets, partial, bytes;
};

constexpr int kMaxBlocksPerSm = 3;
constexpr int kWarps = 8;
constexpr int kMaxPartialFloat4 = 8 * 4 * 4 * 32;  // the largest Config::kPartialFloat4, checked where it is launched

Layout layout_of(int rows, int k, int experts, int sms) {
  const size_t places = (static_cast<size_t>(rows) / 8 + experts + 1) * 8;  // prepared rows, see first_prepared_block
  Layout l{};
  size_t end = 0;
  auto take = [&end](size_t bytes) {
    size_t at = end;
    end += (bytes + 255) / 256 * 256;
    return at;
  };
  l.tickets = take(sizeof(int) * kWarps * kMaxBlocksPerSm * sms);
  l.partial = take(sizeof(float4) * kMaxPartialFloat4 * 2 * kMaxBlocksPerSm * sms);
  l.x = take(sizeof(__half) * places * k);
  l.sums = take(sizeof(__half2) * places * (k / 64));
  l.row_scale = take(sizeof(float) * rows);
  l.bytes = end;
  return l;
}

// Blocks of a kernel that run at once on an SM: asked once per device, since the answer also needs the shared-memory
// limit raised. 0: an error, in *error.
template <typename C>
int resident_blocks(const Device& device, cudaError_t* error) {
  static std::atomic<int> cache[kMaxDevices];
  int known = device.id < kMaxDevices ? cache[device.id].load() : 0;
  if (known == 0) {
    // For the most experts allowed, so that the grid and with it the order of sums is the same for all.
    const int shared = static_cast<int>(C::shared_bytes(kMaxExperts));
    *error = cudaFuncSetAttribute(gemm_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (*error != cudaSuccess) return 0;
    *error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&known, gemm_kernel<C>, C::kThreads,
                                                           shared);
    if (*error != cudaSuccess) return 0;
    known = std::max(1, std::min(known, std::min(C::kMinBlocks, kMaxBlocksPerSm)));
    if (device.id < kMaxDevices) cache[device.id].store(known);
  }
  return known;
}

template <typename C>
cudaError_t launch_gemm(const Device& device, const GemmParams& p, cudaStream_t stream) {
  static_assert(C::kPartialFloat4 <= kMaxPartialFloat4 && C::kWarps == kWarps && C::kMinBlocks <= kMaxBlocksPerSm,
                "the workspace is laid out for less");
  cudaError_t error = cudaSuccess;
  const int blocks = resident_blocks<C>(device, &error);
  if (blocks == 0) return error;
  const size_t shared = C::shared_bytes(p.experts);
#if CUDART_VERSION >= 12030  // the first that captures such a launch into a graph
  if (device.major >= 9) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks * device.sms), config.blockDim = dim3(C::kThreads);
    config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, gemm_kernel<C>, p);
  }
#endif
  gemm_kernel<C><<<blocks * device.sms, C::kThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

#ifdef CCQ_TUNING
int g_variant = -1;
#endif

// By the mean number of rows an expert: tiles of 8, 16 or 32 rows, and of four or two 16-column tiles a warp: four cost
// fewer instructions a weight, two give small problems more blocks. A tile takes only the work of the rows it has, so a
// band too large costs registers, one too small decodes weights twice.
int variant_of(const Device& device, const GemmParams& p) {
#ifdef CCQ_TUNING
  if (g_variant >= 0) return g_variant;
#endif
  const int rows = p.rows / p.experts;
  if (rows <= 3) {
    const double tiles = static_cast<double>(std::min(p.rows, p.experts)) * p.n / 512;  // of four a warp
    return p.k > 1024 && tiles >= 0.4 * 2 * device.sms ? 1 : 0;
  }
  return rows <= 24 ? 2 : 3;
}

template <Pairs kPairs>
cudaError_t choose(const Device& device, const GemmParams& p, cudaStream_t stream) {
  // Columns a warp / 16, blocks of 8 rows, stages, blocks an SM.
  switch (variant_of(device, p)) {
    case 0: return launch_gemm<Config<kPairs, 2, 1, 4, 2>>(device, p, stream);
    case 1: return launch_gemm<Config<kPairs, 4, 1, 4, 2>>(device, p, stream);
    case 2: return launch_gemm<Config<kPairs, 2, 2, 4, 2>>(device, p, stream);
#ifdef CCQ_TUNING
    case 4: return launch_gemm<Config<kPairs, 2, 1, 4, 3>>(device, p, stream);
    case 5: return launch_gemm<Config<kPairs, 4, 2, 4, 1>>(device, p, stream);
#endif
    default: return launch_gemm<Config<kPairs, 4, 4, 4, 1>>(device, p, stream);
  }
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<size_t>(p) % bytes == 0; }

}  // namespace
}  // namespace ccq

extern "C" size_t ccq_moe_gemm_workspace(int rows, int k, int n, int experts) {
  (void)n;
  ccq::Device device;
  if (rows < 0 || k <= 0 || experts <= 0 || ccq::current_device(&device) != cudaSuccess) return 0;
  return ccq::layout_of(rows, k, experts, device.sms).bytes;
}

extern "C" cudaError_t ccq_moe_gemm(const ccq_moe_gemm_args* a, cudaStream_t stream) {
  using namespace ccq;
  if (!a || a->rows < 0 || a->k <= 0 || a->k % 128 || a->n <= 0 || a->n % 16 || a->experts < 1 ||
      a->experts > kMaxExperts || (a->dtype != CCQ_BF16 && a->dtype != CCQ_FP16) ||
      (a->pairs != CCQ_PAIRS_INTEGER && a->pairs != CCQ_PAIRS_GENERAL) ||
      (a->row_order != CCQ_ROWS_PLAIN && a->row_order != CCQ_ROWS_FASTDEPLOY))
    return cudaErrorInvalidValue;
  if (a->rows == 0) return cudaSuccess;
  if (!a->x || !a->quant || !a->scales || !a->columns || !a->out || !a->workspace || (!a->offsets && a->experts != 1) ||
      !aligned(a->x, 16) || !aligned(a->quant, 16) || !aligned(a->scales, 16) || !aligned(a->columns, 16) ||
      !aligned(a->workspace, 256))
    return cudaErrorInvalidValue;
  // Units are counted in 32 bits: row blocks (of 8, at worst) x column tiles (of 128) x K blocks.
  const double units = (a->rows / 8.0 + a->experts) * (a->n / 128.0 + 1) * (a->k / 128.0);
  if (units >= 2147483647.0) return cudaErrorInvalidValue;

  Device device;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  const Layout l = layout_of(a->rows, a->k, a->experts, device.sms);
  char* base = static_cast<char*>(a->workspace);
  GemmParams p{};
  p.offsets = a->offsets, p.quant = a->quant, p.scales = a->scales, p.columns = a->columns;
  p.prepared = {reinterpret_cast<__half*>(base + l.x), reinterpret_cast<__half2*>(base + l.sums),
                reinterpret_cast<float*>(base + l.row_scale), reinterpret_cast<int*>(base + l.tickets)};
  p.partial = reinterpret_cast<float4*>(base + l.partial);
  p.out = a->out, p.rows = a->rows, p.k = a->k, p.n = a->n, p.experts = a->experts, p.dtype = a->dtype;

  // Launched without the programmatic attribute: once it runs, all earlier work is complete, offsets included, so the
  // GEMM may read those before it waits.
  const int tickets = kWarps * kMaxBlocksPerSm * device.sms;
  const bool fastdeploy = a->row_order == CCQ_ROWS_FASTDEPLOY;
  if (a->dtype == CCQ_BF16)
    prepare_kernel<<<a->rows, kPrepareThreads, 0, stream>>>(static_cast<const __nv_bfloat16*>(a->x), a->offsets,
                                                            a->experts, a->k, fastdeploy, a->row_scale, tickets, p.prepared);
  else
    prepare_kernel<<<a->rows, kPrepareThreads, 0, stream>>>(static_cast<const __half*>(a->x), a->offsets,
                                                            a->experts, a->k, fastdeploy, a->row_scale, tickets, p.prepared);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return a->pairs == CCQ_PAIRS_INTEGER ? choose<Pairs::kInteger>(device, p, stream)
                                       : choose<Pairs::kGeneral>(device, p, stream);
}

#ifdef CCQ_TUNING
extern "C" void ccq_moe_gemm_force_variant(int variant) { ccq::g_variant = variant; }
#endif
