// SPDX-License-Identifier: Apache-2.0
// Epilogue of the kernels that split tiles among blocks: partial results added up in order, scales, rounding.
#pragma once

#include "decode.cuh"
#include "prepare.cuh"
#include "ring.cuh"
#include "stream_k.cuh"

namespace ccq {

struct GemmParams {
  const int64_t* offsets;
  const uint8_t* quant;
  const uint8_t* scales;
  const uint32_t* columns;
  Prepared prepared;
  float4* partial;
  void* out;
  const float* caller_scale;  // for moe_wide.cuh, which prepares no rows: what the caller multiplies them by, or NULL
  int rows, k, n, experts, dtype;
  int column_tiles;  // of the kernel's tiles
};

template <typename C, int kNT>
struct Accumulator {
  float o[C::kR][kNT][4];

  __device__ void clear() {
#pragma unroll
    for (int r = 0; r < C::kR; ++r)
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[r][nt][i] = 0.f;
  }
};

// A finished tile: super scale (and the 2^24 of the subnormals), the row's scale, rounding, output.
template <typename C, int kNT, typename W>
__device__ void store_tile(const W& w, const WorkTile& work, const float (&super)[C::kR][2],
                          const Accumulator<C, kNT>& acc) {
  const GemmParams& p = w.p;
  const int g = w.lane / 4, t = w.lane % 4;
#pragma unroll
  for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = nt * 8 + 2 * t + i;
      if (token >= work.rows) continue;
      const float row_scale = p.prepared.row_scale[work.row + token];
      const size_t base = static_cast<size_t>(work.row + token) * p.n;
#pragma unroll
      for (int r = 0; r < C::kR; ++r) {
        const int t16 = w.tile16(work.column) + r;
        if (t16 >= p.n / 16) continue;
        store(p.out, p.dtype, base + t16 * 16 + g, acc.o[r][nt][i] * super[r][0] * row_scale);
        store(p.out, p.dtype, base + t16 * 16 + g + 8, acc.o[r][nt][2 + i] * super[r][1] * row_scale);
      }
    }
}

// A tile that is split among blocks is written by its owner, the block that has its first units. For that block it is the
// last tile of its range; for the others it is the first, so that their partial results have long been stored when the owner
// reads them, and nobody waits (in launches with less than one tile a block all wait for each other's end, once). Partial
// results are added in the order of K: the same bits on every run.
template <typename C, int kNT, typename W>
__device__ float4* partial_of(const W& w, int block) {
  return w.p.partial + (static_cast<size_t>(block) * C::kWarps + w.warp) * (C::kPartialFloat4 / C::kWarps) + w.lane;
}

// Only the rows that the tile has: most tiles of a decoding step have one or two.
template <typename C, int kNT, typename W>
__device__ void store_partial(const W& w, int rows, const Accumulator<C, kNT>& acc) {
  float4* const mine = partial_of<C, kNT>(w, blockIdx.x);
#pragma unroll
  for (int r = 0; r < C::kR; ++r)
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
      const float* o = acc.o[r][nt];
      if (W::first_row(rows, nt) + w.lane % 4 * 2 < rows) __stcg(mine + (r * kNT + nt) * 32, make_float4(o[0], o[1], o[2], o[3]));
    }
}

// A block's partial result between being stored and being signalled to the tile's owner. The signal waits for the writes,
// microseconds on a busy memory system; so one warp sends it for all warps, and late.
template <typename C>
struct PartialSignal {
  Barrier* stored;  // one arrival a warp
  int owner = -1;  // of the block's first tile; -1: there is nobody to signal to

  template <typename W>
  __device__ void publish(const W& w) {
    if (owner >= 0 && w.warp == 0) {
      stored->wait(0);
      __threadfence();
      if (w.lane == 0) atomicAdd(w.p.prepared.counters + owner, 1);
    }
    owner = -1;
  }
};

// Adds the partial results of the blocks after this one, up to block `last`.
template <typename C, int kNT, typename W>
__device__ void add_partials(const W& w, int rows, int last, Accumulator<C, kNT>& acc) {
  const int* const counter = w.p.prepared.counters + blockIdx.x;
  int stored;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(stored) : "l"(counter) : "memory");
  // A vote: lanes stay together, and the compiler knows.
  while (!__all_sync(~0u, stored >= last - static_cast<int>(blockIdx.x)));
  // Partial results in flight at once, added in order: several blocks' where each is small, pieces of one where it is large.
  constexpr int kAll = C::kR * kNT, kBatch = kNT == 1 ? 4 : 1, kSpan = kAll % 8 == 0 ? 8 : kAll % 4 == 0 ? 4 : kAll;
  for (int base = blockIdx.x + 1; base <= last; base += kBatch) {
#pragma unroll
    for (int j0 = 0; j0 < kAll; j0 += kSpan) {
      float4 v[kBatch][kSpan];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float4* from = partial_of<C, kNT>(w, min(base + i, last));
#pragma unroll
        for (int j = 0; j < kSpan; ++j) v[i][j] = __ldcg(from + (j0 + j) * 32);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
          float* o = acc.o[(j0 + j) / kNT][(j0 + j) % kNT];
          if (base + i <= last) o[0] += v[i][j].x, o[1] += v[i][j].y, o[2] += v[i][j].z, o[3] += v[i][j].w;
        }
      if (kSpan < kAll) asm volatile("" ::: "memory");  // the next ones after these: registers
    }
  }
}

// What a warp does with the accumulators of its work tile; `store`: what it does once they are the sums over all of K.
template <typename C, int kNT, typename W, typename P, typename F>
__device__ void epilogue(const W& w, const P& work, PartialSignal<C>& signal, Accumulator<C, kNT>& acc, F&& store) {
  signal.publish(w);
  if (work.kb > 0) {
    store_partial<C, kNT>(w, work.rows, acc);
    signal.stored->arrive_together();
    signal.owner = w.owner(work, 0);
    return;
  }
  const int blocks_k = w.blocks_k();
  if (work.kb_end < blocks_k) add_partials<C, kNT>(w, work.rows, w.owner(work, blocks_k - 1), acc);
  store();
}

}  // namespace ccq
