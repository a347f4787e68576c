// SPDX-License-Identifier: Apache-2.0
// What the launchers of grouped GEMMs share on the host: the device, the workspace, grids and shared memory of persistent kernels.
#pragma once

#include <algorithm>
#include <atomic>

#include "../common/arena.h"
#include "choice.h"
#include "epilogue.cuh"
#include "few_schedule.cuh"
#include "moe_gemm.h"

namespace ccq {

constexpr int kMaxDevices = 64;

struct Device : Gpu {
  int id;
};

inline cudaError_t current_device(Device* device) {
  static std::atomic<uint64_t> cache[kMaxDevices];  // sms << 32 | shared << 8 | major, 0: not asked yet
  cudaError_t error = cudaGetDevice(&device->id);
  if (error != cudaSuccess) return error;
  uint64_t known = device->id < kMaxDevices ? cache[device->id].load() : 0;
  if (known == 0) {
    int sms = 0, major = 0, shared = 0;
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device->id);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device->id);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device->id);
    if (error != cudaSuccess) return error;
    known = static_cast<uint64_t>(sms) << 32 | static_cast<uint64_t>(shared) << 8 | static_cast<uint64_t>(major);
    if (device->id < kMaxDevices) cache[device->id].store(known);
  }
  device->sms = static_cast<int>(known >> 32), device->shared = static_cast<int>(known >> 8 & 0xFFFFFF);
  device->major = static_cast<int>(known & 255);
  return cudaSuccess;
}

#ifdef CCQ_TUNING
// The kernel that benchmarks force, or -1.
inline int& forced_variant() {
  static int variant = -1;
  return variant;
}
#endif

constexpr int kWarpsPerSm = 16;
constexpr int kMaxPartialFloat4 = 9216;
// Of trellis_some.cuh: its most rows an expert, on average; bytes of 8 rows and 256 input rows of activations.
constexpr int kMostSome = 24, kTrellisRowsBytes = 8 * 256 * 4;

// The arrays of a workspace. Partial results: for each SM what one tile of each of its blocks has, which grows with the rows a
// tile may have.
struct Workspace {
  Prepared prepared;
  float4* partial;
  size_t partial_float4;  // for each SM

  Workspace(Arena& arena, int rows, int k, int experts, int sms) {
    const int64_t blocks = int64_t{rows} / 8 + experts + 1;  // of prepared rows, see first_prepared_block
    partial_float4 = rows / experts < kManyRows ? 4096 : kMaxPartialFloat4;
#ifdef CCQ_TUNING
    partial_float4 = kMaxPartialFloat4;
#endif
    prepared.counters = arena.take<int>(int64_t{kWarpsPerSm} * sms);
    partial = arena.take<float4>(static_cast<int64_t>(partial_float4) * sms);
    // CCQ-2T with up to kMostSome rows an expert takes more for each block of 8 rows; of such there are at most so many.
    const int64_t trellis_blocks = std::min<int64_t>(blocks, (kMostSome / 8 + 1) * int64_t{experts} + 1);
    prepared.x = arena.take<char>(std::max(blocks * (k / 128) * kRowsUnitBytes, trellis_blocks * ((k + 255) / 256) * kTrellisRowsBytes));
    prepared.row_scale = arena.take<float>(rows);
  }
};

// What a call and its workspace tell a kernel. `caller_scale` and `column_tiles` are the kernel's own matter.
inline GemmParams gemm_params(const ccq_moe_gemm_args& a, const Workspace& w) {
  GemmParams p{};
  p.offsets = a.offsets, p.quant = a.quant, p.scales = a.scales, p.columns = a.columns;
  p.prepared = w.prepared, p.partial = w.partial;
  p.out = a.out, p.rows = a.rows, p.k = a.k, p.n = a.n, p.experts = a.experts, p.dtype = a.dtype;
  return p;
}

// Blocks of a configuration's kernel that run at once on an SM: asked once per device, since the answer also needs the
// shared-memory limit raised. 0: an error, in *error.
template <typename C, typename K>
int resident_blocks(const Device& device, K* kernel, cudaError_t* error) {
  static std::atomic<int> cache[kMaxDevices];
  int known = device.id < kMaxDevices ? cache[device.id].load() : 0;
  if (known == 0) {
    // For the most experts allowed, so that the grid and with it the order of sums is the same for all.
    const int shared = static_cast<int>(C::shared_bytes(kMaxExperts));
    *error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (*error != cudaSuccess) return 0;
    *error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&known, kernel, C::kThreads, shared);
    if (*error != cudaSuccess) return 0;
    known = std::max(1, std::min(known, C::kMinBlocks));
    if (device.id < kMaxDevices) cache[device.id].store(known);
  }
  return known;
}

template <typename C, typename K, typename... A>
cudaError_t launch_gemm(const Device& device, K* kernel, GemmParams p, size_t partial_float4, cudaStream_t stream,
                        const A&... more) {
  static_assert(C::kPartialFloat4 * C::kMinBlocks <= kMaxPartialFloat4 && C::kWarps * C::kMinBlocks <= kWarpsPerSm,
                "the workspace is laid out for less");
  if (C::kPartialFloat4 * C::kMinBlocks > partial_float4) return cudaErrorInvalidConfiguration;  // the bands disagree
  cudaError_t error = cudaSuccess;
  p.column_tiles = (p.n / 16 + C::kTiles - 1) / C::kTiles;
  const int blocks = resident_blocks<C>(device, kernel, &error);
  if (blocks == 0) return error;
  return launch_early(kernel, blocks * device.sms, C::kThreads, C::shared_bytes(p.experts), stream, p, more...);
}

// Kernels of few rows: `shared` bytes of shared memory; C: what the kernel was made with.
template <typename C, typename P>
cudaError_t launch_few(const Device& device, void (*kernel)(const P), P p, size_t shared, int threads, cudaStream_t stream) {
  // More than half of what there is: of two blocks that share a multiprocessor because the next kernel starts early, one would
  // have to wait while other multiprocessors are idle.
  const size_t at_least = std::max<size_t>(shared, device.shared / 2 + 1024);
  static std::atomic<size_t> raised[kMaxDevices];  // the shared-memory limit set so far
  if (device.id >= kMaxDevices || raised[device.id].load() < at_least) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(at_least));
    if (error != cudaSuccess) return error;
    if (device.id < kMaxDevices) raised[device.id].store(at_least);
  }
  p.column_tiles = Divider((p.n / 16 + C::kTiles - 1) / C::kTiles);
  // At most; with one row a block, or one matrix, exactly.
  const int64_t tiles = static_cast<int64_t>(p.offsets ? p.rows : ceil_div(p.rows, C::kRows)) * p.column_tiles.by;
  if (tiles > 2147483647) return cudaErrorInvalidValue;
  const int grid = static_cast<int>(std::min<int64_t>(tiles, device.sms));
  p.each = static_cast<int>(tiles) / grid, p.longer = static_cast<int>(tiles) % grid;
  if (C::kRows == 1 && p.each / p.column_tiles.by + 2 > 2 * C::entries(p.experts)) return cudaErrorInvalidConfiguration;
  return launch_early(kernel, grid, threads, at_least, stream, p);
}

inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<size_t>(p) % bytes == 0; }

}  // namespace ccq
