// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for one to four rows an expert: what a decoding step needs, in a single launch.
//
// Work. A tile is (expert, kRows of its rows or fewer, 16 * kTiles columns) and all of K. The kernel is persistent: blocks take
// equal contiguous ranges of tiles, columns fastest, so that a block converts activations to integers (in shared memory, all of
// K) once or twice in its life. No prologue kernel runs before, no tile is split among blocks.
//
// Warps. A tile's K is sliced among kWK warps in pairs of units (2 x 128 rows); the next tile's pairs go on with the next warp,
// so that over a few tiles all warps get the same. A warp converts the rows of its own slice and begins with it; other slices it
// meets from the second tile on, when they are long ready. Each warp fetches its own weights through its own ring (ring.cuh), which
// runs on across tiles: the memory never waits for a tile's end. Nothing but the sums of a tile ties warps together, and
// those go through kSumsSlots buffers: a warp stores its partial sums and goes on, another one runs the tile's epilogue later.
//
// Under way are 67 KB a multiprocessor (kStages). Twice as much is slower, by 3 to 5 % (docs/notes/kernels.md, version 30).
//
// Registers. 16 warps leave 128. What all lanes share must be known to be shared (`uniform`), and what is rarely needed is
// worked out anew: else the compiler reads the thread's number in the inner loop, which costs more than any of this.
//
// Activations are integers of 16 bits, two signed digits of 8; weights unsigned bytes (decode.cuh). The integer tensor
// cores multiply exactly, and so do the group scales: all of a warp's slice is one integer, whatever the order. Against
// fp16 this halves the masks of decoding and the steps. Integers are off by at most 2^-16 of a slice's largest value (2^-14
// where windows 2 and 3 meet them, which are stored four times): below 1e-3 of the row's norm for any row, 1e-4 for a Gaussian one.
//
// Few rows leave most of a step's 8 columns (B's) empty. They carry other groups instead: with R rows a tile's 8 columns
// are 4 / R groups ("slots") of R rows of two digits. A step of group j has zeros in the columns of other slots, so that
// one accumulator collects 4 / R groups side by side. Scales then cost 4 / R times less.
#pragma once

#include "few_schedule.cuh"

namespace ccq {

// Where a group's values of one row lie: column and byte of slots (R rows a tile).
template <int R>
struct Slots {
  static constexpr int kGroups = 4 / R;                 // groups that share an accumulator
  static constexpr int kUnit = 256 * R + 16, kZeros = 256 * R;
};

// A warp's slice of K: pairs of units `pair`, `pair + kWK`, ... of a tile. In chunks of 16 values a lane: two pairs a step.
template <typename C>
__device__ int chunk_of_slice(int pair, int step) {
  const int lane = threadIdx.x % 32;
  return (pair + (2 * step + lane / 16) * C::kWK) * 16 + lane % 16;
}

// The first chunks of each row that this lane converts.
template <typename C>
__device__ void load_slice(const FewParams& p, const FewShared<C>& s, const FewRows& rows, int pair,
                           Chunk (&kept)[C::kRows][C::kKept]) {
  int row, count;
  rows.place<C>(p, s, &row, &count);
#pragma unroll
  for (int j = 0; j < C::kKept; ++j)
#pragma unroll
    for (int r = 0; r < C::kRows; ++r) {
      const int c = chunk_of_slice<C>(pair, j);
      kept[r][j] = Chunk{};
      if (c < p.k / 16) kept[r][j].load(row_in(p, row, count, r), c);
    }
}

// A slice of the rows becomes integers in shared memory, laid out for R rows a tile, with a scale of its own: no warp waits
// for the largest value of another one. Warps with the same slice (kWN > 1) take its steps in turn.
template <typename C, typename F>
__device__ void convert_slice(const FewParams& p, const FewShared<C>& s, const FewRows& rows, int pair, int wn,
                              const Chunk (&kept)[C::kRows][C::kKept], F&& meanwhile) {
  constexpr int R = C::kRows, kUnit = Slots<R>::kUnit, kGroups = Slots<R>::kGroups;
  const int chunks = p.k / 16, blocks_k = p.k / 128, lane = threadIdx.x % 32;
  const int steps = ((blocks_k + 1) / 2 - pair + 2 * C::kWK - 1) / (2 * C::kWK);  // 0 for a warp that has none
  int row, count;
  rows.place<C>(p, s, &row, &count);
  float scale[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    uint32_t largest = kept[r][0].largest(p.dtype);
    if (C::kKept > 1) largest = max(largest, kept[r][C::kKept - 1].largest(p.dtype));
#pragma unroll 1
    for (int i = C::kKept; i < steps; ++i) {
      const int c = chunk_of_slice<C>(pair, i);
      if (c >= chunks) continue;
      Chunk other;
      other.load(row_in(p, row, count, r), c);
      largest = max(largest, other.largest(p.dtype));
    }
    const IntegerScale own(__reduce_max_sync(~0u, largest));
    scale[r] = own.scale;
    if (lane == r && wn == 0) s.back[pair * R + r] = p.row_scale && count > 0 ? own.back * p.row_scale[row + min(r, count - 1)] : own.back;
  }
  meanwhile();
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {  // whole warps walk the loop together and guard inside it, for quads share a group
    if (C::kWN > 1 && i % C::kWN != wn) continue;
    const int c = chunk_of_slice<C>(pair, i), group = c / 4, t = c % 4;
    char* const unit = s.activations + c / 8 * kUnit;
    if (R < 4 && c < chunks && c % 8 == 0) *reinterpret_cast<uint4*>(unit + Slots<R>::kZeros) = make_uint4(0, 0, 0, 0);
    // Groups that are not there: an odd number of units, two units an accumulator.
    if (R == 1 && blocks_k % 2 && c == chunks - 8) *reinterpret_cast<int4*>(s.offsets + blocks_k / 2 * 8 + 4) = int4{};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Chunk chunk = kept[r][0];
      if (C::kKept > 1 && i == 1) chunk = kept[r][C::kKept - 1];
      if (i >= C::kKept && c < chunks) chunk.load(row_in(p, row, count, r), c);
      if (p.fastdeploy) chunk.arrange();
      const Digits digits(chunk, p.dtype, scale[r]);
#pragma unroll
      for (int d = 0; d < 2; ++d) {
        const int offset = quad_sum(digits.offset[d]);
        if (c >= chunks) continue;
        if (t == 0) s.offsets[group / kGroups * 8 + group % kGroups * 2 * R + 2 * r + d] = offset;
        *reinterpret_cast<uint4*>(unit + group % 2 * (128 * R) + t * 16 + (2 * r + (d ^ group % 2)) * 64) = digits.bytes[d];
      }
    }
  }
}

// Main loop: this warp's units of a tile, columns g and g + 8 of each of kR tiles, row t % R, all groups, into `out`.
template <typename C>
__device__ void few_main_loop(const FewShared<C>& s, Ring<C::kR, C::kStages>& ring, FewProducer<C>& producer, int pair,
                             const Column<C::kPairs> (&column)[C::kR][2], float2 (&out)[C::kR]) {
  constexpr int kR = C::kR, R = C::kRows, kUnit = Slots<R>::kUnit, kZeros = Slots<R>::kZeros;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, blocks_k = producer.blocks_k;
  // Of this lane's column of B. In odd groups the digits change places, so that quads side by side write to other banks.
  const int slot = g / (2 * R), mine = g % (2 * R) * 64 + t * 16;
  // Nibbles of this lane's accumulators: their slot's group is even or odd, in the first or the second unit (R = 1).
  const int shift = R == 1 ? t % 2 * 4 : R == 2 ? t / 2 * 4 : 0;
  uint32_t four = 4;
  asm volatile("" : "+r"(four));
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
      producer.request(ring);
      ring.next();
      const char* const x = s.activations + kb * kUnit;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool first = R == 4 || half + (R == 1 ? u : 0) == 0;
        int2 c;
        if (first) c = *reinterpret_cast<const int2*>(s.offsets + (R == 1 ? pair : R == 2 ? kb : 2 * kb + half) * 8 + t * 2);
        const bool active = R == 4 || slot == (R == 1 ? 2 * u + half : half);
        const uint4 b = *reinterpret_cast<const uint4*>(x + (active ? half * (128 * R) + (mine ^ half * 64) : kZeros));
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          const uint32_t low = half ? q[r].z : q[r].x, high = half ? q[r].w : q[r].y;
          const ByteWindows a0(column[r][0].template codes<0>(low), four);
          const ByteWindows c0(column[r][1].template codes<0>(high), four);
          if (first) mma_bytes(d[r], a0.even, c0.even, a0.odd, c0.odd, b.x, b.y, c.x, c.y);
          else mma_bytes(d[r], a0.even, c0.even, a0.odd, c0.odd, b.x, b.y);
          const ByteWindows a1(column[r][0].template codes<1>(low), four);
          const ByteWindows c1(column[r][1].template codes<1>(high), four);
          mma_bytes(d[r], a1.even, c1.even, a1.odd, c1.odd, b.z, b.w);
        }
        if (R == 4) scaled(4 * half);
      }
      if (R == 2) scaled(shift);
    }
    if (R == 1) scaled(shift);
  }
  const float back = s.back[(pair & (C::kWK - 1)) * R + t % R];
  // Digits together, and slots: lanes t and t ^ 2 have the same row, with R = 1 all four lanes of a quad.
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    float v[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v[i] = fmaf(static_cast<float>(o[r][2 * i]), 256.f, static_cast<float>(o[r][2 * i + 1])) * back;
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
  const int expert = block == rows.block ? rows.expert : min(expert_of<C>(s, block, rows.expert), p.experts - 1);
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

// Epilogue: one warp adds up all warps' partial sums of a tile, in the order of the warps, and writes the result. `rows`: its
// rows or the next ones.
template <typename C>
__device__ void few_epilogue(const FewParams& p, const FewShared<C>& s, int tile, int begin, const FewRows& rows) {
  const int tiles_n = p.n / 16, block = p.column_tiles.divide(tile);
  FewRows own{rows.expert, block};
  if (C::kRows == 1) own.expert = expert_of<C>(s, block, 0);
  else while (block < s.blocks[own.expert]) --own.expert;
  int first_row, count;
  own.place<C>(p, s, &first_row, &count);
  const int i = tile - begin, slot = i % C::kSumsSlots;
  const int t16 = (tile - block * p.column_tiles.by) * C::kTiles;
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
    if (t16 + r >= tiles_n || row >= count) continue;
    const float2 super = load_supers(columns + r * kPlaneBytes, g);
    const size_t to = static_cast<size_t>(first_row + row) * p.n + (t16 + r) * 16 + g;
    store(p.out, p.dtype, to, sum.x * super.x);
    store(p.out, p.dtype, to + 8, sum.y * super.y);
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
  const int wk = warp % C::kWK, wn = warp / C::kWK;
  FewRows rows;
  Chunk kept[C::kRows][C::kKept];
  if (lane == 0) {  // of each warp, for the lanes of one would do it one after another
#pragma unroll
    for (int i = 0; i < C::kStages; ++i) s.full[warp * C::kStages + i].init(1);
    if (warp < C::kColumnSlots) s.columns_full[warp].init(32);
    if (warp < C::kSumsSlots) s.sums_ready[warp].init(C::kWarps * kWarpArrivals), s.sums_free[warp].init(kWarpArrivals);
    if (warp == C::kWarps - 1) s.rows_ready->init(C::kWarps * kWarpArrivals);
    publish_barriers();
  }
  // Whether the host knows the block's range of tiles: always, but with several matrices and rows a block.
  const bool known = C::kRows == 1 || !p.offsets;
  int begin = blockIdx.x * p.each + min(static_cast<int>(blockIdx.x), p.longer);
  int end = begin + p.each + (static_cast<int>(blockIdx.x) < p.longer), first_block = p.column_tiles.divide(begin);
  Ring<kR, C::kStages> ring(s.rings + warp * Ring<kR, C::kStages>::kBytes, s.full + warp * C::kStages);
  FewProducer<C> producer{p, s, column_tiles, tiles_n, blocks_k, wk, wn};
  if (known) producer.start(begin, end, first_block);
  if (p.offsets && static_cast<int>(threadIdx.x) * 16 < p.experts) prefetch_line(p.offsets + threadIdx.x * 16);
  wait_for_prerequisites();  // before any read: an earlier kernel may have written anything, weights included
  // Activations come first, then offsets and columns: they would wait behind the weights.
  if (!known) {
    scan_offsets<C>(p, s, &begin, &end);
    first_block = p.column_tiles.divide(begin);
  }
  if (begin == end) return;
  rows = FewRows{uniform(known ? 0 : s.start->expert), first_block};
  load_slice<C>(p, s, rows, wk, kept);
  if (C::kRows == 1 && p.offsets) find_experts<C>(p, s, first_block, p.column_tiles.divide(end - 1));
  else if (!p.offsets && warp == 0) one_expert<C>(p, s, first_block, end);
  // Barriers stand, and no weights are requested before all activations are: those would wait behind them.
  if (known) __syncthreads();
  if (C::kRows == 1) rows.expert = uniform(expert_of<C>(s, first_block, 0));
  if (!known) producer.start(begin, end, first_block);
  producer.find_expert(rows.expert);
  if (warp < min(C::kColumnSlots, end - begin)) fetch_columns<C>(p, s, rows, begin + warp, warp);
  // Requests beyond what the memory system takes hold up their warp, so at the beginning they come bit by bit.
#pragma unroll 1
  for (int i = 0; i < C::kFirst - 1; ++i) producer.request(ring, i);
  int finished = begin, pair = wk;
  for (int tile = begin; tile < end; ++tile, pair = producer.next_pair(pair)) {
    const int i = tile - begin, block = p.column_tiles.divide(tile), column_tile = tile - block * column_tiles;
    const bool change = i > 0 && column_tile == 0;
    if (change) {
      rows = FewRows{uniform(expert_of<C>(s, block, rows.expert)), block};
      load_slice<C>(p, s, rows, pair, kept);
    }
    if (change) __syncthreads();  // the activations there are no longer read
    if (change || i == 0) {
      convert_slice<C>(p, s, rows, pair, wn, kept, [&] { if (i == 0) producer.request(ring, C::kFirst - 1); });
      s.rows_ready->arrive_together();
      if (i == 0)
#pragma unroll 1
        for (int j = C::kFirst; j < C::kStages; ++j) producer.request(ring, j);
    }
    // Slices of other warps are first read in the tile after, or in this one by warps with the same slice.
    const bool after = C::kWN > 1 ? change || i == 0 : !change && (column_tile == 1 || i == 1);
    if (after) s.rows_ready->wait((block - first_block) & 1);
    Column<C::kPairs> column[kR][2];
    const char* const columns = s.columns + i % C::kColumnSlots * C::kColumnBytes + wn * kR * kPlaneBytes;
    s.columns_full[i % C::kColumnSlots].wait((i / C::kColumnSlots) & 1);
#pragma unroll
    for (int r = 0; r < kR; ++r)
      load_columns<C::kPairs>(columns + r * kPlaneBytes, columns + (C::kTiles + r) * kPlaneBytes, lane / 4, column[r]);

    float2 out[kR];
    few_main_loop<C>(s, ring, producer, pair, column, out);

    const int slot = i % C::kSumsSlots, t = lane % 4;
    if (i >= C::kSumsSlots) s.sums_free[slot].wait((i / C::kSumsSlots + 1) & 1);
    float2* const to = s.sums + (slot * C::kWK + wk) * C::kEntries + wn * kR * 8 * C::kRows;
    if (t < C::kRows)
#pragma unroll
      for (int r = 0; r < kR; ++r) to[(r * 8 + lane / 4) * C::kRows + t] = out[r];
    s.sums_ready[slot].arrive_together();
    // The tile before, which all warps have left by now; at the end this one too.
#pragma unroll 1
    for (; finished <= (tile + 1 == end ? tile : tile - 1); ++finished)
      if ((finished - begin) % C::kWarps == warp) {
        few_epilogue<C>(p, s, finished, begin, rows);
        const int next = finished + C::kColumnSlots;
        if (next < end) fetch_columns<C>(p, s, rows, next, (finished - begin) % C::kColumnSlots);
      }
  }
}

}  // namespace ccq
