// SPDX-License-Identifier: Apache-2.0
// The kernel of linear_w4.h: linear_w8_few.cuh's way of multiplying, for experts, with half a byte a weight.
//
// A pass is up to kRows rows of one expert; its tiles are 16 columns and all of K. Blocks take equal numbers of tiles of all passes,
// side by side. Each warp has a slice of K: it converts the activations of its slice to two signed digits when a pass begins,
// fetches its weights through a ring of asynchronous copies that runs on across tiles and passes, and multiplies nibbles as bytes.
// The warps' sums of a tile are added in their order by one warp while the others are at the next tile.
#include <algorithm>

#include "linear_slice.cuh"
#include "linear_w4.h"
#include "warp_scan.cuh"

namespace ccq_w4 {

using namespace ccq;

template <int kRows_, int kStages_, int kSlots_>
struct Config {
  static constexpr int kRows = kRows_, kStages = kStages_, kSlots = kSlots_, kWarps = 16, kThreads = 32 * kWarps;
  static constexpr int kUnits = 4;                     // of 64 rows of the weight, in one copy
  static constexpr int kPitch = 32 * kUnits + 32;      // bytes from a column to the next: lanes' reads meet in no bank
  static constexpr int kStageBytes = 16 * kPitch;
  static constexpr int kDigits = 2 * kRows, kParts = kRows > 4 ? 2 : 1, kEntries = 16 * kRows;
  static size_t shared_bytes(int k, int experts) {
    return size_t{1} * kWarps * kStages * kStageBytes + size_t{2} * kRows * k + size_t{4} * kSlots * kWarps * kEntries +
           16 * kSlots + 4 * experts;
  }
};

__device__ inline void copy_to_shared(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared), "l"(global) : "memory");
}

// Where a block is among tiles of passes of experts.
template <int kRows>
struct Cursor {
  const int* ends;
  int tiles, expert, row, last_row, tile;  // rows row..last_row-1 of the expert are left

  __device__ int end_of(int e) const { return e < 0 ? 0 : ends[e]; }
  // At pass `pass`; all lanes together.
  __device__ void find(int experts, int pass) {
    const int lane = threadIdx.x % 32;
    for (int base = 0; base < experts; base += 32) {
      const int e = base + lane;
      const int count = e < experts ? (ends[e] - end_of(e - 1) + kRows - 1) / kRows : 0;
      const int upto = prefix_sum(lane, count);
      const uint32_t beyond = __ballot_sync(~0u, upto > pass);
      if (beyond) {
        const int at = __ffs(beyond) - 1, before = __shfl_sync(~0u, upto - count, at);
        expert = base + at, row = end_of(expert - 1) + (pass - before) * kRows, last_row = ends[expert];
        return;
      }
      pass -= __shfl_sync(~0u, upto, 31);
    }
  }
  __device__ void next() {
    if (++tile < tiles) return;
    tile = 0, row += kRows;
    while (row >= last_row) row = last_row, last_row = ends[++expert];
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1) gemm(const __grid_constant__ ccq_w4_gemm_args a) {
  constexpr int R = C::kRows, kStages = C::kStages, kUnits = C::kUnits, kWarps = C::kWarps;
  extern __shared__ __align__(128) char shared[];
  dependents_may_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int steps = a.k / 64, tiles = a.n / 16;
  const int first = steps * warp / kWarps, units = steps * (warp + 1) / kWarps - first;  // this warp's slice of K

  char* const ring = shared + warp * (kStages * C::kStageBytes);
  char* const x = shared + kWarps * kStages * C::kStageBytes + static_cast<size_t>(first) * (128 * R);
  float* const sums =
      reinterpret_cast<float*>(shared + kWarps * kStages * C::kStageBytes + static_cast<size_t>(steps) * (128 * R));
  Barrier* const ready = reinterpret_cast<Barrier*>(sums + C::kSlots * kWarps * C::kEntries);
  Barrier* const free = ready + C::kSlots;
  int* const ends = reinterpret_cast<int*>(free + C::kSlots);
  if (lane == 0 && warp < C::kSlots) ready[warp].init(kWarps * kWarpArrivals), free[warp].init(kWarpArrivals);
  wait_for_prerequisites();
  for (int e = threadIdx.x; e < a.experts; e += C::kThreads) ends[e] = static_cast<int>(a.offsets[e]);
  __syncthreads();

  int passes = 0;
  for (int base = 0; base < a.experts; base += 32) {
    const int e = base + lane;
    passes += e < a.experts ? (ends[e] - (e ? ends[e - 1] : 0) + R - 1) / R : 0;
  }
  passes = __reduce_add_sync(~0u, passes);
  const int64_t total = static_cast<int64_t>(passes) * tiles;
  const int64_t begin = total * blockIdx.x / gridDim.x;
  const int count = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x - begin);
  if (count == 0) return;
  Cursor<R> at{ends, tiles};
  at.find(a.experts, static_cast<int>(begin / tiles));
  at.tile = static_cast<int>(begin % tiles);

  // Copies of a tile's slice: kUnits units each, the last one perhaps fewer. A group is committed for each, asked for or not.
  const int copies = (units + kUnits - 1) / kUnits, all = copies * count;
  Cursor<R> fetched = at;
  int asked = 0, asked_in_tile = 0, asked_stage = 0;
  auto request = [&] {
    if (asked < all) {
      const int pieces = min(kUnits, units - asked_in_tile * kUnits) * 2;  // of 16 bytes, of each column
      const char* const from = static_cast<const char*>(a.weight) +
                               (static_cast<int64_t>(fetched.expert) * a.n + fetched.tile * 16) * (a.k / 2) +
                               (first + asked_in_tile * kUnits) * 32;
      const uint32_t to = shared_address(ring + asked_stage * C::kStageBytes);
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        const int column = (lane + 32 * j) / (2 * kUnits), piece = lane % (2 * kUnits);
        if (piece < pieces)
          copy_to_shared(to + column * C::kPitch + piece * 16, from + static_cast<int64_t>(column) * (a.k / 2) + piece * 16);
      }
      ++asked;
      if (++asked_stage == kStages) asked_stage = 0;
      if (++asked_in_tile == copies) {
        asked_in_tile = 0;
        if (asked < all) fetched.next();
      }
    }
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  };
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) request();

  // Adds up the warps' sums of a tile in the order of the warps. One warp.
  auto epilogue = [&](int i, const Cursor<R>& where) {
    const int slot = i % C::kSlots;
    ready[slot].wait((i / C::kSlots) & 1);
    const float* const parts = sums + slot * (kWarps * C::kEntries);
#pragma unroll
    for (int e0 = 0; e0 < C::kEntries; e0 += 32) {
      const int e = e0 + lane, column = where.tile * 16 + e % 16, row = where.row + e / 16;
      if (row >= where.last_row) continue;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += parts[w * C::kEntries + e];
      const auto* const scales = static_cast<const __nv_bfloat16*>(a.scale);
      const float scale =
          __bfloat162float(scales[(static_cast<int64_t>(where.expert) * a.n + column) * a.scale_stride]);
      static_cast<__nv_bfloat16*>(a.out)[static_cast<int64_t>(row) * a.n + column] = __float2bfloat16_rn(sum * scale);
    }
    free[slot].arrive_together();
  };

  float back[(R + 3) / 4];
  int offset[(R + 3) / 4][2];
  Cursor<R> previous = at;
  int stage = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (i == 0 || at.tile == 0) {
      // This slice of x as digits: [unit][2 * row + digit][t], 16 bytes each. Rows that are not there stay what memory held: they
      // meet nothing but their own results, which nobody stores.
#pragma unroll
      for (int q = 0; q < (R + 3) / 4; ++q) back[q] = 0.f, offset[q][0] = offset[q][1] = 0;
#pragma unroll 1
      for (int r = 0; r < min(R, at.last_row - at.row); ++r) {
        const char* const row = static_cast<const char*>(a.x) + (static_cast<int64_t>(at.row + r) * a.k + first * 64) * 2;
        const ccq_w8::SliceDigits made = ccq_w8::SliceDigits::make<C::kDigits>(row, units, x + 2 * r * 64, [](const Chunk& chunk) {
          // Even values of every eight come before the odd ones, as halves of bytes do.
          Chunk mixed;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t* const w = chunk.words + 4 * h;
            mixed.words[4 * h] = __byte_perm(w[0], w[1], 0x5410), mixed.words[4 * h + 1] = __byte_perm(w[2], w[3], 0x5410);
            mixed.words[4 * h + 2] = __byte_perm(w[0], w[1], 0x7632), mixed.words[4 * h + 3] = __byte_perm(w[2], w[3], 0x7632);
          }
          return mixed;
        });
        if (t == r % 4) {
#pragma unroll
          for (int q = 0; q < (R + 3) / 4; ++q)
            if (q == r / 4) back[q] = made.back, offset[q][0] = made.sum[0] * 8, offset[q][1] = made.sum[1] * 8;
        }
      }
      __syncwarp();
    }
    const int slot = i % C::kSlots;
    int sum[C::kParts][4] = {};
    const char* digits = x;
#pragma unroll 1
    for (int c = 0; c < copies; ++c) {
      asm volatile("cp.async.wait_group %0;\n" ::"n"(kStages - 1) : "memory");
      __syncwarp();
      const char* const columns = ring + stage * C::kStageBytes + g * C::kPitch + t * 8;
      if (++stage == kStages) stage = 0;
      const int here = min(kUnits, units - c * kUnits);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (u >= here) break;
        const uint2 low = *reinterpret_cast<const uint2*>(columns + u * 32);
        const uint2 high = *reinterpret_cast<const uint2*>(columns + u * 32 + 8 * C::kPitch);
        constexpr uint32_t kMask = 0x0F0F0F0Fu;
#pragma unroll
        for (int p = 0; p < C::kParts; ++p) {
          const uint4 b = *reinterpret_cast<const uint4*>(digits + (8 * p + g) * 64 + t * 16);
          mma_bytes(sum[p], low.x & kMask, high.x & kMask, low.x >> 4 & kMask, high.x >> 4 & kMask, b.x, b.y);
          mma_bytes(sum[p], low.y & kMask, high.y & kMask, low.y >> 4 & kMask, high.y >> 4 & kMask, b.z, b.w);
        }
        digits += 128 * R;
      }
      __syncwarp();  // every lane has used what it needs of the stage
      request();
    }
    if (i >= C::kSlots) free[slot].wait((i / C::kSlots + 1) & 1);
    float* const to = sums + (slot * kWarps + warp) * C::kEntries;
#pragma unroll
    for (int p = 0; p < C::kParts; ++p)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        to[(4 * p + t) * 16 + 8 * h + g] = fmaf(static_cast<float>(sum[p][2 * h] - offset[p][0]), 256.f,
                                                 static_cast<float>(sum[p][2 * h + 1] - offset[p][1])) * back[p];
    ready[slot].arrive_together();
    if (i > 0 && (i - 1) % kWarps == warp) epilogue(i - 1, previous);
    if (i + 1 == count && i % kWarps == warp) epilogue(i, at);
    previous = at;
    if (i + 1 < count) at.next();
  }
}

template <typename C>
bool launch(const ccq_w4_gemm_args& a, cudaStream_t stream, cudaError_t* error) {
  int id = 0, most = 0, processors = 0;
  *error = cudaGetDevice(&id);
  if (*error == cudaSuccess) *error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  if (*error == cudaSuccess) *error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, id);
  const size_t shared = C::shared_bytes(a.k, a.experts);
  if (*error != cudaSuccess) return true;
  if (shared > static_cast<size_t>(most)) return false;
  auto kernel = gemm<C>;
  *error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (*error == cudaSuccess) *error = launch_early(kernel, dim3(processors), C::kThreads, shared, stream, a);
  return true;
}

// kWords words of a thread, 8 rows of one column each, a block's width apart: neighbours read and write neighbouring bytes.
constexpr int kDequantThreads = 256, kWords = 4;

__global__ void __launch_bounds__(kDequantThreads) dequant(const uint32_t* weight, const __nv_bfloat16* scale, int scale_stride,
                                                           uint32_t per_column, uint32_t words, uint4* out) {
  const uint32_t first = blockIdx.x * (kDequantThreads * kWords) + threadIdx.x;
  uint32_t states[kWords];
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    const uint32_t i = first + j * kDequantThreads;
    states[j] = i < words ? weight[i] : 0;
  }
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    const uint32_t i = first + j * kDequantThreads;
    if (i >= words) return;
    const float s = __bfloat162float(scale[static_cast<int64_t>(i / per_column) * scale_stride]);
    __nv_bfloat162 values[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int pair = states[j] >> 8 * b;
      values[b] = __floats2bfloat162_rn(static_cast<float>((pair & 15) - 8) * s, static_cast<float>((pair >> 4 & 15) - 8) * s);
    }
    out[i] = *reinterpret_cast<const uint4*>(values);
  }
}

}  // namespace ccq_w4

extern "C" cudaError_t ccq_dequant_w4(const void* weight, const void* scale, int scale_stride, int k, int n, void* out,
                                      cudaStream_t stream) {
  if (k <= 0 || k % 32 || n <= 0 || scale_stride <= 0 || !weight || !scale || !out) return cudaErrorInvalidValue;
  const int64_t words = static_cast<int64_t>(n) * (k / 8), block = ccq_w4::kDequantThreads * ccq_w4::kWords;
  if (words > 4294967295 - block) return cudaErrorInvalidValue;
  ccq_w4::dequant<<<static_cast<unsigned>((words + block - 1) / block), ccq_w4::kDequantThreads, 0, stream>>>(
      static_cast<const uint32_t*>(weight), static_cast<const __nv_bfloat16*>(scale), scale_stride,
      static_cast<uint32_t>(k / 8), static_cast<uint32_t>(words), static_cast<uint4*>(out));
  return cudaGetLastError();
}

extern "C" cudaError_t ccq_w4_gemm(const ccq_w4_gemm_args* args, cudaStream_t stream) {
  using namespace ccq_w4;
  const ccq_w4_gemm_args& a = *args;
  if (a.k <= 0 || a.k % 64 || a.k > ccq_w8::kFewMostK || a.n <= 0 || a.n % 16 || a.experts <= 0 || a.experts > 1024 ||
      a.rows < 0 || a.scale_stride <= 0)
    return cudaErrorInvalidValue;
  if (a.rows == 0) return cudaSuccess;
  if (!a.x || !a.offsets || !a.weight || !a.scale || !a.out) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  if (a.tokens > 4 && launch<Config<8, 2, 2>>(a, stream, &error)) return error;
  if (launch<Config<4, 3, 3>>(a, stream, &error) || launch<Config<4, 2, 2>>(a, stream, &error)) return error;
  return cudaErrorNotSupported;
}
