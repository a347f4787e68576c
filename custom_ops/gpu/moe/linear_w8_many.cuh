// SPDX-License-Identifier: Apache-2.0
// The kernel of linear_w8.h for 9 to 64 rows on Hopper: activations become integers of 16 bits, as in linear_w8_few.cuh (linear_slice.cuh).
//
// A cluster of kSlices thread blocks takes whole tiles of 64 columns; each block has a slice of K, always the same one, and keeps
// that slice of the activations in shared memory as two signed digits. Two warpgroups work on a tile each: every warp fetches the
// bytes of its 16 columns through its own ring of bulk copies, which runs on across tiles and begins while the kernel before still
// runs, and the warpgroup multiplies them as they are by all digits. Each block then sends the others their share of the columns
// as float32, and a third warpgroup adds up the slices in their order, so that the result depends on nothing but the shape.
#pragma once

#include "cluster.cuh"
#include "linear_slice.cuh"
#include "linear_w8.h"
#include "wgmma_bytes.cuh"

namespace ccq_w8 {

// kRows: 16, 32, 48 or 64; kSlices: blocks of a cluster, 2, 4 or 8; kUnits: units of 1 KiB that one copy brings; kSlots: tiles of
// a warpgroup whose sums may lie in a block's memory at a time.
template <int kRows_, int kSlices_, int kStages_, int kUnits_, int kSlots_>
struct ManyConfig {
  static constexpr int kRows = kRows_, kSlices = kSlices_, kStages = kStages_, kUnits = kUnits_, kSlots = kSlots_;
  // Two warpgroups multiply; the others convert activations too, and one of them has results to add up.
  static constexpr int kWorkers = 8, kWarps = kWorkers + 8, kThreads = 32 * kWarps;
  static constexpr int kColumns = 64;
  static constexpr int kRingBytes = kWorkers * kStages * kUnits * 1024;
  static constexpr int kParts = 8 / kSlices;              // eights of columns of a tile that a block adds up
  static constexpr int kSlotBytes = kColumns * kRows * 4;  // from all slices
  static constexpr size_t kAlone = 120 * 1024;  // with this much a block is alone on its multiprocessor
  static constexpr int kUnitDigits = 2 * kRows * 64;
  // Of the largest slice, up to whole copies.
  static __host__ __device__ int units(int k) {
    return ((k / 64 + kSlices - 1) / kSlices + kUnits - 1) / kUnits * kUnits;
  }
  static size_t shared_bytes(int k) {
    const size_t used = 1024 + size_t{1} * units(k) * kUnitDigits + kRingBytes + 2 * kSlots * kSlotBytes + kRows * 16 +
                        8 * (kWorkers * kStages + 4 * kSlots);
    return used > kAlone ? used : kAlone;
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1) many(const __grid_constant__ ccq_linear_w8_args a, int clusters) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace ccq;
  constexpr int R = C::kRows, S = C::kSlices, kStages = C::kStages, kUnits = C::kUnits, kSlots = C::kSlots,
                kWorkers = C::kWorkers;
  extern __shared__ char memory[];
  dependents_may_start();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int rank = cluster_rank(), cluster = blockIdx.x / S, group = warp / 4;
  const int steps = a.k / 64, tiles = (a.n + C::kColumns - 1) / C::kColumns;
  const int begin = static_cast<int>(static_cast<int64_t>(tiles) * cluster / clusters);
  const int count = static_cast<int>(static_cast<int64_t>(tiles) * (cluster + 1) / clusters) - begin;
  // This block's slice of K, in units.
  const int first = steps * rank / S, units = steps * (rank + 1) / S - first;

  char* const digits = memory + (-shared_address(memory) & 1023);  // the same in every block
  char* const slots = digits + C::units(a.k) * C::kUnitDigits;
  char* const rings = slots + 2 * kSlots * C::kSlotBytes;
  int4* const of_row = reinterpret_cast<int4*>(rings + C::kRingBytes);  // 128 times the sums of digits, and the scale's inverse
  Barrier* const ready = reinterpret_cast<Barrier*>(of_row + R);  // [warpgroup][slot]
  Barrier* const free = ready + 2 * kSlots;                       // the same: all blocks have read what this one sent
  Barrier* const full = free + 2 * kSlots + warp * kStages;
  char* const ring = rings + warp * (kStages * kUnits * 1024);
  if (lane == 0) {
    if (warp < kWorkers)
      for (int i = 0; i < kStages; ++i) full[i].init(1);
    else if (warp == kWorkers)
      for (int slot = 0; slot < 2 * kSlots; ++slot) {
        ready[slot].init(1), free[slot].init((C::kWarps - kWorkers) * S);
        ready[slot].arrive_and_expect(C::kSlotBytes);
      }
    publish_barriers();
  }
  __syncwarp();

  const int own_tiles = warp < kWorkers ? (count + 1 - group) / 2 : 0;
  auto columns_of = [&](int i) {  // a warp beyond n reads the last columns again
    const int sixteen = min((begin + group + 2 * i) * 4 + warp % 4, a.n / 16 - 1);
    return static_cast<const char*>(a.weight) + (static_cast<int64_t>(sixteen) * steps + first) * 1024;
  };
  SliceRequests<kStages, kUnits> requests(ring, full, units, own_tiles, columns_of(0));
  const int copies = requests.copies;
  int asked_tile = 0;
  auto request = [&] { requests.request([&](const char*& from) { from = columns_of(++asked_tile); }); };
  // The weights are nobody's result: the first are fetched while the kernel before may still run.
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) request();
  cluster_barrier();  // all barriers of all blocks stand
  wait_for_prerequisites();

  // This slice of x as digits: of each unit [2 * row + digit][64 bytes], swizzled, in the order of K that the weights' bytes have
  // in registers: word w of chunk t meets piece w of 16 bytes, there word t. Rows that are not there stay what memory held:
  // they meet nothing but their own results, which nobody stores.
  for (int i = threadIdx.x; i < (copies * kUnits - units) * (C::kUnitDigits / 16); i += C::kThreads)
    reinterpret_cast<uint4*>(digits + units * C::kUnitDigits)[i] = make_uint4(0, 0, 0, 0);  // meets nothing of a last copy
  constexpr int kKept = 2;
  const int chunks = 4 * units, all_chunks = (chunks + 31) / 32 * 32;
  Chunk kept[kKept];
  auto row_of = [&](int r) { return static_cast<const char*>(a.x) + (static_cast<int64_t>(r) * a.k + first * 64) * 2; };
  auto read = [&](int r) {
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      kept[j] = Chunk{};
      if (lane + 32 * j < chunks) kept[j].load(row_of(r), lane + 32 * j);
    }
  };
  if (warp < a.rows) read(warp);
#pragma unroll 1
  for (int r = warp; r < a.rows; r += C::kWarps) {
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < kKept; ++j) largest = max(largest, kept[j].largest(CCQ_BF16));
#pragma unroll 1
    for (int c = lane + 32 * kKept; c < chunks; c += 32) {
      Chunk other;
      other.load(row_of(r), c);
      largest = max(largest, other.largest(CCQ_BF16));
    }
    const IntegerScale scale(__reduce_max_sync(~0u, largest));
    int sum[2] = {0, 0};
    auto put = [&](const Chunk& chunk, int c) {
      const PlainDigits made(chunk, scale.scale);
#pragma unroll
      for (int d = 0; d < 2; ++d) {
        uint32_t words[4] = {made.bytes[d].x, made.bytes[d].y, made.bytes[d].z, made.bytes[d].w};
        transpose_quad(words);
        if (c < chunks) {
          char* const to = digits + c / 4 * C::kUnitDigits + (2 * r + d) * 64 + (t ^ r % 4) * 16;
          *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
          sum[d] += made.sum[d];
        }
      }
    };
    Chunk now[kKept];
#pragma unroll
    for (int j = 0; j < kKept; ++j) now[j] = kept[j];
    if (r + C::kWarps < a.rows) read(r + C::kWarps);
#pragma unroll
    for (int j = 0; j < kKept; ++j)
      if (32 * j < all_chunks) put(now[j], lane + 32 * j);
#pragma unroll 1
    for (int c = lane + 32 * kKept; c < all_chunks; c += 32) {
      Chunk other{};
      if (c < chunks) other.load(row_of(r), c);
      put(other, c);
    }
#pragma unroll
    for (int d = 0; d < 2; ++d) sum[d] = __reduce_add_sync(~0u, sum[d]);
    if (lane == 0) of_row[r] = make_int4(sum[0] * 128, sum[1] * 128, __float_as_int(scale.back), 0);
  }
  publish_barriers();  // and digits, which the tensor cores read
  __syncthreads();

  if (warp < kWorkers) {
    const uint64_t b = byte_descriptor(shared_address(digits));
    int stage = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int i = 0; i < own_tiles; ++i) {
      int sum[R / 4][4] = {};
      uint4 even[kUnits][2], odd[kUnits][2];
      auto take = [&](uint4 (&q)[kUnits][2]) {
        full[stage].wait(parity);
        const char* const unit = ring + stage * (kUnits * 1024) + lane * 16;
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
#pragma unroll
          for (int h = 0; h < 2; ++h) q[u][h] = *reinterpret_cast<const uint4*>(unit + (2 * u + h) * 512);
        if (++stage == kStages) stage = 0, parity ^= 1;
      };
      auto multiply = [&](const uint4 (&q)[kUnits][2], int c) {
        wgmma_fence();
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const uint64_t at = b + static_cast<uint64_t>((c * kUnits + u) * (C::kUnitDigits / 16));
          wgmma_bytes(sum, q[u][0].x, q[u][1].x, q[u][0].y, q[u][1].y, at);
          wgmma_bytes(sum, q[u][0].z, q[u][1].z, q[u][0].w, q[u][1].w, at + 2);
        }
        wgmma_commit();
        // Now every lane has what it needs of the stage. Not before: a load that was only issued waits behind the tensor cores'
        // reads for longer than a copy from L2 takes.
        __syncwarp();
        request();
      };
      if (copies > 0) take(even);
#pragma unroll 1
      for (int c = 0; c < copies; c += 2) {
        multiply(even, c);
        if (c + 1 < copies) {
          wgmma_wait<1>();
          take(odd);
          multiply(odd, c + 1);
        }
        if (c + 2 < copies) {
          wgmma_wait<1>();
          take(even);
        }
      }
      wgmma_wait<0>();
      const int slot = group * kSlots + i % kSlots;
      if (i >= kSlots) wait_for_cluster(free + slot, (i / kSlots - 1) & 1);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int eighth = warp % 4 * 2 + h, to = eighth / C::kParts;
        const uint32_t there = address_in(ready + slot, to);
        const uint32_t part = address_in(slots + slot * C::kSlotBytes, to) + lane * 16 +
                              (rank * C::kParts + eighth % C::kParts) * (R / 16) * 512;
#pragma unroll
        for (int q = 0; q < R / 16; ++q) {
          float v[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int4 row = of_row[16 * q + 4 * j + t];
            v[j] = fmaf(static_cast<float>(sum[4 * q + j][2 * h] - row.x), 256.f,
                        static_cast<float>(sum[4 * q + j][2 * h + 1] - row.y)) * __int_as_float(row.z);
          }
          store_async(part + q * 512, *reinterpret_cast<const uint4*>(v), there);
        }
      }
    }
  } else {
    const int own = threadIdx.x - 32 * kWorkers;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int slot = i % 2 * kSlots + i / 2 % kSlots;
      wait_for_cluster(ready + slot, (i / 2 / kSlots) & 1);
      const float4* const parts = reinterpret_cast<const float4*>(slots + slot * C::kSlotBytes);
      constexpr int kItems = C::kParts * (R / 16) * 32, kEach = (kItems + 127) / 128;
      float4 sum[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int e = own + 128 * j;
        sum[j] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (e >= kItems) continue;
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const float4 part = parts[s * kItems + e];
          sum[j].x += part.x, sum[j].y += part.y, sum[j].z += part.z, sum[j].w += part.w;
        }
      }
      if (own == 0 && i + 2 * kSlots < count) ready[slot].arrive_and_expect(C::kSlotBytes);
      __syncwarp();
      if (lane < S) arrive_at(address_in(free + slot, lane));
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int e = own + 128 * j, q = e / 32 % (R / 16), part = e / 32 / (R / 16);
        const int column = (begin + i) * C::kColumns + (rank * C::kParts + part) * 8 + g;
        if (e >= kItems || column >= a.n) continue;
        const float scale = __bfloat162float(static_cast<const __nv_bfloat16*>(a.scale)[column]);
        const float v[4] = {sum[j].x, sum[j].y, sum[j].z, sum[j].w};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int row = 16 * q + 4 * m + t;
          if (row < a.rows)
            static_cast<__nv_bfloat16*>(a.out)[static_cast<int64_t>(row) * a.n + column] = __float2bfloat16_rn(v[m] * scale);
        }
      }
    }
  }
  __syncwarp();
  cluster_barrier();  // nobody leaves while others may still write to its memory
#endif
}

}  // namespace ccq_w8
