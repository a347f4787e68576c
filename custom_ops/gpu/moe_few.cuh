// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for one to four rows an expert: what a decoding step needs, in a single launch.
//
// Work. A tile is (expert, kRows of its rows or fewer, 16 * kTiles columns) and all of K. Blocks take equal runs of tiles,
// columns fastest, so that a block converts activations to fp16 (in shared memory, all of K) once or twice in its life.
// No kernel runs before, no tile is cut across blocks.
//
// Warps. A tile's K is dealt out to kWK warps in pairs of units (2 x 128 rows); the deal goes on from tile to tile, so
// that over a few tiles all warps get the same. Each warp fetches its own weights through its own ring (ring.cuh), which
// runs on across tiles: the memory never waits for a tile's end. Nothing but the sums of a tile ties warps together, and
// those go through kSumsSlots buffers: a warp leaves its share and goes on, another one adds up the tile before.
//
// Activations are integers of 16 bits, two signed digits of 8; weights unsigned bytes (decode.cuh). The integer tensor
// cores multiply exactly, and so do the group scales: all of a warp's share is one integer, whatever the order. Against
// fp16 this halves the masks of decoding and the steps. Integers are off by at most 2^-16 of a row's largest value (2^-15
// where window 0 meets them, which is stored twice), below 1e-3 of the row's norm for any row and 4e-5 for a Gaussian one.
//
// Few rows leave most of a step's 8 columns (B's) empty. They carry other groups instead: with R rows a tile's 8 columns
// are 4 / R groups ("slots") of R rows of two digits. A step of group j has zeros in the columns of other slots, so that
// one accumulator collects 4 / R groups side by side. Scales then cost 4 / R times less.
#pragma once

#include "few_plan.cuh"

namespace ccq {

// Where a group's values of one row lie: column and byte of slots (R rows a tile).
template <int R>
struct Slots {
  static constexpr int kGroups = 4 / R;                 // groups that share an accumulator
  static constexpr int kUnit = 256 * R + 16, kZeros = 256 * R;
};

// Rows that are in shared memory.
struct FewRows {
  int expert, block, row, count;  // count: 0 for rows behind the last expert's

  template <typename C>
  __device__ void set(const FewParams& p, const FewShared<C>& s, int block_, int expert_) {
    block = block_, expert = min(expert_, p.experts - 1);
    if (C::kRows == 1) {
      row = block, count = expert_ < p.experts;
    } else {
      row = s.rows[expert] + (block - s.blocks[expert]) * C::kRows;
      count = min(C::kRows, s.rows[expert + 1] - row);
    }
  }
  // Where a row lies in memory, or the last one in its place.
  __device__ int place(int r) const { return row + min(r, max(count, 1) - 1); }
  __device__ const char* in(const FewParams& p, int r) const {
    return static_cast<const char*>(p.x) + static_cast<size_t>(place(r)) * p.k * 2;
  }
};

// Rows become integers in shared memory, laid out for R rows a tile. `kept`: the first chunk of each row that this thread
// reads. `meanwhile` runs before the threads first meet. All threads of the block.
template <typename C, typename F>
__device__ void convert_rows(const FewParams& p, const FewShared<C>& s, const FewRows& rows, Chunk (&kept)[C::kRows],
                             F&& meanwhile) {
  constexpr int R = C::kRows;
  const int chunks = p.k / 16, blocks_k = p.k / 128;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    uint32_t largest = kept[r].largest(p.dtype);
    for (int c = threadIdx.x + C::kThreads; c < chunks; c += C::kThreads) {
      Chunk other;
      other.load(rows.in(p, r), c);
      largest = max(largest, other.largest(p.dtype));
    }
    largest = __reduce_max_sync(~0u, largest);
    if (threadIdx.x % 32 == 0) s.largest[threadIdx.x / 32 * R + r] = largest;
  }
  // Zeros of each unit, and the offsets of groups that are not there (an odd number of units, two units an accumulator).
  for (int i = threadIdx.x; i < blocks_k; i += C::kThreads)
    *reinterpret_cast<uint4*>(s.activations + i * Slots<R>::kUnit + Slots<R>::kZeros) = make_uint4(0, 0, 0, 0);
  if (R == 1 && blocks_k % 2 && threadIdx.x < 4) s.offsets[blocks_k / 2 * 8 + 4 + threadIdx.x] = 0;
  meanwhile();
  __syncthreads();
  float scale[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int lane = threadIdx.x % 32;
    const IntegerScale own(__reduce_max_sync(~0u, lane < C::kWarps ? s.largest[lane * R + r] : 0));
    scale[r] = own.scale;
    if (static_cast<int>(threadIdx.x) == r)
      s.back[r] = p.row_scale ? own.back * p.row_scale[rows.place(r)] : own.back;
  }
  // Quads share a group, so whole warps walk the loop together and guard inside it.
  for (int c0 = 0; c0 < chunks; c0 += C::kThreads) {
    const int c = c0 + threadIdx.x, group = c / 4, t = c % 4;
    char* const to = s.activations + c / 8 * Slots<R>::kUnit + group % 2 * (128 * R) + t * 16;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (c0 > 0 && c < chunks) kept[r].load(rows.in(p, r), c);
      if (p.fastdeploy) kept[r].arrange();
      const Digits digits(kept[r], p.dtype, scale[r]);
#pragma unroll
      for (int d = 0; d < 2; ++d) {
        const int offset = quad_sum(digits.offset[d]);
        if (c >= chunks) continue;
        constexpr int kGroups = Slots<R>::kGroups;
        if (t == 0) s.offsets[group / kGroups * 8 + group % kGroups * 2 * R + 2 * r + d] = offset;
        *reinterpret_cast<uint4*>(to + (2 * r + d) * 64) = digits.bytes[d];
      }
    }
  }
  __syncthreads();
}

// This warp's units of a tile: columns g and g + 8 of each of kR tiles, row t % R, all groups, into `out`.
template <typename C>
__device__ void multiply_few(const FewShared<C>& s, Ring<C::kR, C::kStages>& ring, FewFetch<C>& fetch, int pair,
                             const Column<C::kPairs> (&column)[C::kR][2], float2 (&out)[C::kR]) {
  constexpr int kR = C::kR, R = C::kRows, kUnit = Slots<R>::kUnit, kZeros = Slots<R>::kZeros;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, blocks_k = fetch.blocks_k;
  const int slot = g / (2 * R), mine = g % (2 * R) * 64 + t * 16;  // of this lane's column of B
  // Nibbles of this lane's accumulators: their slot's group is even or odd, in the first or the second unit (R = 1).
  const int shift = R == 1 ? t % 2 * 4 : R == 2 ? t / 2 * 4 : 0;
  uint32_t four = 4, thirty_two = 32;
  asm volatile("" : "+r"(four), "+r"(thirty_two));
  int o[kR][4] = {};  // [..][2]: digits, of column g and of column g + 8

  for (; 2 * pair < blocks_k; pair += C::kWK) {
    int d[kR][4];
    uint32_t scale[kR];
    auto scaled = [&](int by) {
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const int f0 = scale[r] >> by & 15, f1 = scale[r] >> (by + 8) & 15;
        o[r][0] += f0 * d[r][0], o[r][1] += f0 * d[r][1], o[r][2] += f1 * d[r][2], o[r][3] += f1 * d[r][3];
      }
    };
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int kb = 2 * pair + u;
      if (u == 1 && kb == blocks_k) break;
      ring.wait();
      const char* const unit = ring.unit;
      uint4 q[kR];
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        q[r] = *reinterpret_cast<const uint4*>(unit + r * 512 + lane * 16);
        const uint32_t word = *reinterpret_cast<const uint16_t*>(unit + kR * 512 + r * 16 + g * 2);
        scale[r] = R > 1 || u == 0 || t >= 2 ? word : scale[r];
      }
      __syncwarp();  // every lane has what it needs of the stage
      fetch.request(ring);
      ring.next();
      const char* const x = s.activations + kb * kUnit;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool first = R == 4 || half + (R == 1 ? u : 0) == 0;
        int2 c;
        if (first) c = *reinterpret_cast<const int2*>(s.offsets + (R == 1 ? pair : R == 2 ? kb : 2 * kb + half) * 8 + t * 2);
        const bool active = R == 4 || slot == (R == 1 ? 2 * u + half : half);
        const uint4 b = *reinterpret_cast<const uint4*>(x + (active ? half * (128 * R) + mine : kZeros));
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          const uint32_t low = half ? q[r].z : q[r].x, high = half ? q[r].w : q[r].y;
          const ByteWindows a0(column[r][0].template codes<0>(low), four, thirty_two);
          const ByteWindows c0(column[r][1].template codes<0>(high), four, thirty_two);
          if (first) mma_bytes(d[r], a0.outer, c0.outer, a0.inner, c0.inner, b.x, b.y, c.x, c.y);
          else mma_bytes(d[r], a0.outer, c0.outer, a0.inner, c0.inner, b.x, b.y);
          const ByteWindows a1(column[r][0].template codes<1>(low), four, thirty_two);
          const ByteWindows c1(column[r][1].template codes<1>(high), four, thirty_two);
          mma_bytes(d[r], a1.outer, c1.outer, a1.inner, c1.inner, b.z, b.w);
        }
        if (R == 4) scaled(4 * half);
      }
      if (R == 2) scaled(shift);
    }
    if (R == 1) scaled(shift);
  }
  // Digits together, and slots: lanes t and t ^ 2 have the same row, with R = 1 all four lanes of a quad.
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    float v[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v[i] = fmaf(static_cast<float>(o[r][2 * i]), 256.f, static_cast<float>(o[r][2 * i + 1]));
      if (R < 4) v[i] += __shfl_xor_sync(~0u, v[i], 2);
      if (R < 2) v[i] += __shfl_xor_sync(~0u, v[i], 1);
    }
    out[r] = make_float2(v[0], v[1]);
  }
}

// A tile's columns into a slot. All lanes of one warp.
template <typename C>
__device__ void fetch_columns(const FewParams& p, const FewShared<C>& s, const FewRows& rows, int tile, int slot) {
  const int tiles_n = p.n / 16, column_tiles = p.column_tiles.by, block = p.column_tiles.divide(tile);
  const int expert = block == rows.block ? rows.expert : min(expert_of<C>(p, s, block, rows.expert), p.experts - 1);
  const int t16 = (tile - block * column_tiles) * C::kTiles;
  const size_t first = (static_cast<size_t>(expert) * tiles_n + t16) * 32;
  const size_t plane = static_cast<size_t>(p.experts) * tiles_n * 32;
  char* const to = s.columns + slot * C::kColumnBytes;
#pragma unroll
  for (int j = 0; j < C::kPlanes; ++j)
    for (int i = threadIdx.x % 32; i < C::kTiles * 8; i += 32)
      if (t16 + i / 8 < tiles_n) copy16(to + j * (C::kTiles * kPlaneBytes) + i * 16, p.columns + j * plane + first + i * 4);
  s.columns_full[slot].arrive_after_copies();
}

// One warp adds up all warps' shares of a tile, in the order of the warps, and writes the result.
template <typename C>
__device__ void finish_tile(const FewParams& p, const FewShared<C>& s, int tile, int begin, const FewRows& rows) {
  const int tiles_n = p.n / 16;
  const int i = tile - begin, slot = i % C::kSumsSlots;
  const int t16 = (tile - p.column_tiles.divide(tile) * p.column_tiles.by) * C::kTiles;
  const char* const columns = s.columns + i % C::kColumnSlots * C::kColumnBytes;
  const float2* const from = s.sums + slot * (C::kWK * C::kEntries);
  s.sums_ready[slot].wait((i / C::kSumsSlots) & 1);
  for (int e = threadIdx.x % 32; e < C::kTiles * 8 * C::kRows; e += 32) {
    float2 sum = from[e];
    for (int w = 1; w < C::kWK; ++w) {
      const float2 v = from[w * C::kEntries + e];
      sum.x += v.x, sum.y += v.y;
    }
    const int row = e % C::kRows, g = e / C::kRows % 8, r = e / C::kRows / 8;
    if (t16 + r >= tiles_n || row >= rows.count) continue;
    const float2 super = load_supers(columns + r * kPlaneBytes, g);
    const float back = s.back[row];
    const size_t to = static_cast<size_t>(rows.row + row) * p.n + (t16 + r) * 16 + g;
    store(p.out, p.dtype, to, sum.x * super.x * back);
    store(p.out, p.dtype, to + 8, sum.y * super.y * back);
  }
  s.sums_free[slot].arrive_together();
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1) few_kernel(const FewParams p) {
  dependents_may_start();
  extern __shared__ __align__(128) char shared[];
  constexpr int kR = C::kR;
  const int blocks_k = p.k / 128, tiles_n = p.n / 16, column_tiles = p.column_tiles.by;
  const FewShared<C> s(shared, blocks_k, p.experts);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  FewRows rows;
  Chunk kept[C::kRows] = {};
  auto load_rows = [&] {
    if (static_cast<int>(threadIdx.x) < p.k / 16)
#pragma unroll
      for (int r = 0; r < C::kRows; ++r) kept[r].load(rows.in(p, r), threadIdx.x);
  };
  if (warp > 0 && lane == 0) {  // one lane after another would take microseconds
    for (int w = warp == 1 ? 0 : warp; w <= warp; ++w)
      for (int i = 0; i < C::kStages; ++i) s.full[w * C::kStages + i].init(1);
    for (int i = warp - 2; i >= 0 && i < C::kColumnSlots; i += C::kWarps) s.columns_full[i].init(32);
    for (int i = warp - 8; i >= 0 && i < C::kSumsSlots; i += C::kWarps)
      s.sums_ready[i].init(C::kWarps * kWarpArrivals), s.sums_free[i].init(kWarpArrivals);
    publish_barriers();
  }
  wait_for_prerequisites();  // before any read: an earlier kernel may have written anything, weights included
  // Activations come first, then offsets and columns: they would wait behind the weights.
  int begin = blockIdx.x * p.each + min(static_cast<int>(blockIdx.x), p.longer), first_expert = 0;
  int end = begin + p.each + (static_cast<int>(blockIdx.x) < p.longer);
  if (C::kRows == 1) {
    if (begin == end) return;
    rows.row = p.column_tiles.divide(begin), rows.count = 1;
    load_rows();
    first_expert = expert_of<C>(p, s, rows.row, 0);
  }
  if (C::kRows > 1 && warp == 0) scan_offsets<C>(p, s);
  __syncthreads();
  if (C::kRows > 1) {
    begin = s.start->begin, end = s.start->end;
    if (begin == end) return;
    first_expert = s.start->expert;
  }

  const int wk = warp % C::kWK, wn = warp / C::kWK, first_block = p.column_tiles.divide(begin);
  Ring<kR, C::kStages> ring(s.rings + warp * Ring<kR, C::kStages>::kBytes, s.full + warp * C::kStages);
  rows.set<C>(p, s, first_block, first_expert);
  FewFetch<C> fetch{p, s, end, column_tiles, tiles_n, blocks_k, wk, wn,
                    begin, first_block, begin - first_block * column_tiles, wk, first_block, rows.expert};
  if (warp < min(C::kColumnSlots, end - begin)) fetch_columns<C>(p, s, rows, begin + warp, warp);
  if (C::kRows > 1) load_rows();
  // Orders beyond what the memory system takes hold up their warp, so at the beginning they come bit by bit.
  fetch.aim();
  fetch.request(ring, 0);
  convert_rows<C>(p, s, rows, kept, [&] { fetch.request(ring, 1); });
#pragma unroll
  for (int i = 2; i < C::kStages; ++i) fetch.request(ring, i);
  int finished = begin, pair = wk;
  for (int tile = begin; tile < end; ++tile, pair = fetch.next_pair(pair)) {
    const int i = tile - begin, block = p.column_tiles.divide(tile), column_tile = tile - block * column_tiles;
    if (block != rows.block) {  // all tiles before are finished (below)
      rows.set<C>(p, s, block, expert_of<C>(p, s, block, rows.expert));
      load_rows();
      __syncthreads();  // the activations there are no longer read
      convert_rows<C>(p, s, rows, kept, [] {});
    }
    Column<C::kPairs> column[kR][2];
    const char* const columns = s.columns + i % C::kColumnSlots * C::kColumnBytes + wn * kR * kPlaneBytes;
    s.columns_full[i % C::kColumnSlots].wait((i / C::kColumnSlots) & 1);
#pragma unroll
    for (int r = 0; r < kR; ++r)
      load_columns<C::kPairs>(columns + r * kPlaneBytes, columns + (C::kTiles + r) * kPlaneBytes, lane / 4, column[r]);

    float2 out[kR];
    multiply_few<C>(s, ring, fetch, pair, column, out);

    const int slot = i % C::kSumsSlots, t = lane % 4;
    if (i >= C::kSumsSlots) s.sums_free[slot].wait((i / C::kSumsSlots + 1) & 1);
    float2* const to = s.sums + (slot * C::kWK + wk) * C::kEntries + wn * kR * 8 * C::kRows;
    if (t < C::kRows)
#pragma unroll
      for (int r = 0; r < kR; ++r) to[(r * 8 + lane / 4) * C::kRows + t] = out[r];
    s.sums_ready[slot].arrive_together();
    // The tile before, which all warps have left by now; at the end of these rows this one too.
    const int until = column_tile + 1 == column_tiles || tile + 1 == end ? tile : tile - 1;
    for (; finished <= until; ++finished)
      if ((finished - begin) % C::kWarps == warp) {
        finish_tile<C>(p, s, finished, begin, rows);
        const int next = finished + C::kColumnSlots;
        if (next < end) fetch_columns<C>(p, s, rows, next, (finished - begin) % C::kColumnSlots);
      }
  }
}

}  // namespace ccq
