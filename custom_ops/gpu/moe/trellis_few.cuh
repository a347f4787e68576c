// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM with CCQ-2T weights for one to four rows an expert, in a single launch.
//
// Work is cut as in moe_few.cuh: a tile is (expert, kRows of its rows or fewer, 64 columns) and all of K, blocks take equal contiguous
// ranges of tiles. A block's four warpgroups share a tile's K in pairs of units (2 x 128 rows); each has its own ring of stages, one
// bulk copy a pair. A warp has 16 of the 64 columns.
//
// Weights. The two hash words of a code byte are the tensor cores' unsigned bytes as they stand (trellis.cuh). On Hopper `wgmma` takes
// them from registers, and runs while the next group is decoded (mma.sync does not: it adds its time); two groups are under way,
// with accumulators of their own, and a group's scale meets its accumulators one group later. Before Hopper mma.sync does the same.
//
// Activations are integers of 16 bits, two signed digits of 8, of the value and of its negative. They stand in shared memory, all of K,
// in the order in which `wgmma` reads B: of each step of four code bytes (one a lane of a quad) two matrices of 8 columns (row,
// digit) x 16 bytes, one for each hash word. Integers are exact; so is the sum over a warpgroup's K, whatever the order.
#pragma once

#include "moe_few.cuh"
#include "trellis.cuh"
#include "wgmma.cuh"

namespace ccq {

// 64 columns x 128 rows of packed weights: codes of four 16-column tiles, then a word for each two columns (trellis_repack.h).
constexpr int kTrellisUnitBytes = 4 * 512 + 4 * 32;

template <int kRows_, int kStages_, bool kWgmma_>
struct TrellisFewConfig {
  static constexpr bool kWgmma = kWgmma_;
  static constexpr int kRows = kRows_, kStages = kStages_;  // stages: of a warpgroup, a pair of units each
  static constexpr int kWK = 4, kWN = 4, kWarps = kWK * kWN, kThreads = kWarps * 32, kTiles = 4;
  static constexpr int kColumnSlots = 3, kSumsSlots = 3;
  static constexpr int kColumnBytes = kTiles * 16 * 4, kEntries = kTiles * 8 * kRows;
  static constexpr int kStageBytes = 2 * kTrellisUnitBytes, kRingsBytes = kWK * kStages * kStageBytes;
  static constexpr int kBarriers = kWarps * kStages + kColumnSlots + 2 * kSumsSlots + 1;
  // Of a group's activations: four steps of two matrices of 16 bytes a column (`wgmma` has 8 columns, used or not); 16 more, so that
  // lanes of several groups write to different banks.
  static constexpr int kHalfStepBytes = 16 * (kWgmma ? 8 : 2 * kRows), kStepBytes = 2 * kHalfStepBytes, kGroupBytes = 4 * kStepBytes + 16;
  // The scale of all K that a warpgroup has goes into one sum: the longest K whose sum cannot overflow.
  static constexpr int kMostGroups = 68;  // 2^31 / (64 rows * 255 * 128 * 15)
  // A lane may read 8 columns where there are less.
  __host__ __device__ static constexpr int activation_bytes(int blocks_k) { return blocks_k * 2 * kGroupBytes + (kWgmma ? 0 : 128); }
  __host__ __device__ static constexpr int offset_bytes(int) { return kWarps * kRows * 4; }  // largest values found
  __host__ __device__ static constexpr int entries(int experts) { return kRows > 1 ? experts + 1 : 64; }
  static constexpr size_t shared_bytes(int k, int experts) {
    const int blocks_k = k / 128;
    return kRingsBytes + kColumnSlots * kColumnBytes + kSumsSlots * kWK * kEntries * 8 + activation_bytes(blocks_k) +
           offset_bytes(blocks_k) + kBarriers * 8 + kWK * kRows * 4 + sizeof(FewStart) + 2 * entries(experts) * sizeof(int);
  }
  static constexpr bool sums_fit(int k) { return (k / 64 + kWK - 1) / kWK + 2 <= kMostGroups; }
};

// d[64 x 8] = a[64 x 32] * b[32 x 8], or added to d; unsigned bytes by signed bytes. Of the 64 rows a warp has 16.
template <bool kAdd>
__device__ inline void wgmma_bytes(int (&d)[4], const uint32_t (&a)[4], uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %9, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k32.s32.u8.s8 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, p; }\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0)
      : "memory");
#endif
}
// Until at most kPending groups are under way; then d may be read.
template <int kPending>
__device__ inline void wgmma_wait_for(int (&d)[4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %4;\n" : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "n"(kPending) : "memory");
#endif
}
// B's descriptor without a swizzle: matrices of 8 columns x 16 bytes, the second half of K 128 bytes after the first.
__device__ inline uint64_t byte_descriptor(uint32_t shared) {
  return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) | 8ull << 16 | 16ull << 32;
}

// A warpgroup's ring, which its first warp fills.
template <typename C>
struct TrellisRing {
  char* const memory;
  Barrier* const full;
  int stage = 0;
  uint32_t parity = 0;

  __device__ Barrier* empty() const { return full + C::kWK * C::kStages; }
  __device__ const char* wait() const {
    full[stage].wait(parity);
    return memory + stage * C::kStageBytes;
  }
  __device__ void release() {  // all lanes together
    empty()[stage].arrive_together();
    if (++stage == C::kStages) stage = 0, parity ^= 1;
  }
};

// The pairs of units of a warpgroup's tiles, in the order in which they are requested.
template <typename C>
struct TrellisProducer {
  const FewParams& p;
  const FewShared<C>& s;
  const int column_tiles, blocks_k, wk;
  int end, tile, block, column, first_pair, pair;  // first_pair: the first one that the warpgroup has in the tile
  int expert_block = -1, expert = 0;
  int stage = 0;
  uint32_t parity = 1;  // of the round before: passed at once in the first

  __device__ static int next_pair(int pair_, int blocks_k) { return (pair_ - (blocks_k + 1) / 2) & (C::kWK - 1); }
  __device__ void start(int begin, int end_, int first_block) {
    end = end_, tile = begin, block = first_block, column = begin - first_block * column_tiles, first_pair = pair = wk;
  }
  // The next pair into the next stage, or nothing.
  __device__ void request(const TrellisRing<C>& ring) {
    while (tile < end && 2 * pair >= blocks_k) {
      ++tile, first_pair = next_pair(first_pair, blocks_k), pair = first_pair;
      if (++column == column_tiles) column = 0, ++block;
    }
    if (tile == end) return;
    if (block != expert_block) expert_block = block, expert = uniform(min(expert_of<C>(s, block, expert), p.experts - 1));
    ring.empty()[stage].wait(parity);
    if (threadIdx.x % 32 == 0) {
      const size_t unit = static_cast<size_t>(expert * column_tiles + column) * blocks_k + 2 * pair;
      const int bytes = (2 * pair + 1 < blocks_k ? 2 : 1) * kTrellisUnitBytes;
      ring.full[stage].arrive_and_expect(bytes);
      bulk_copy(ring.memory + stage * C::kStageBytes, p.quant + unit * kTrellisUnitBytes, bytes, ring.full + stage, streaming_policy());
    }
    __syncwarp();
    pair += C::kWK;
    if (++stage == C::kStages) stage = 0, parity ^= 1;
  }
};

// Chunk `number` (of 16 values) of a warpgroup's slice: pairs `pair`, `pair + kWK`, ...
template <typename C>
__device__ int trellis_chunk(int pair, int number) {
  return (pair + number / 16 * C::kWK) * 16 + number % 16;
}
template <typename C>
__device__ void trellis_load(const FewParams& p, const FewShared<C>& s, const FewRows& rows, int pair, int wn, Chunk (&kept)[C::kRows]) {
  int row, count;
  rows.place<C>(p, s, &row, &count);
  const int c = trellis_chunk<C>(pair, wn * 32 + threadIdx.x % 32);
#pragma unroll
  for (int r = 0; r < C::kRows; ++r) {
    kept[r] = Chunk{};
    if (c < p.k / 16 && r < count) kept[r].load(row_in(p, row, count, r), c);
  }
}

// A slice of the rows becomes integers in shared memory, with a scale of its own. The warps of its warpgroup together.
template <typename C>
__device__ void trellis_convert(const FewParams& p, const FewShared<C>& s, const FewRows& rows, int pair, int wk, int wn,
                                const Chunk (&kept)[C::kRows]) {
  constexpr int R = C::kRows;
  const int chunks = p.k / 16, lane = threadIdx.x % 32, own = wn * 32 + lane;
  int row, count;
  rows.place<C>(p, s, &row, &count);
  uint32_t* const found = reinterpret_cast<uint32_t*>(s.offsets) + wk * C::kWN * R;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r >= count) continue;
    uint32_t largest = kept[r].largest(p.dtype);
#pragma unroll 1
    for (int i = own + 128; trellis_chunk<C>(pair, i) < chunks; i += 128) {
      Chunk other;
      other.load(row_in(p, row, count, r), trellis_chunk<C>(pair, i));
      largest = max(largest, other.largest(p.dtype));
    }
    largest = __reduce_max_sync(~0u, largest);
    if (lane == 0) found[wn * R + r] = largest;
  }
  asm volatile("bar.sync %0, 128;\n" ::"r"(1 + wk) : "memory");
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r >= count) continue;
    uint32_t largest = found[r];
#pragma unroll
    for (int w = 1; w < C::kWN; ++w) largest = max(largest, found[w * R + r]);
    const IntegerScale scale(largest);
    if (lane == 0 && wn == 0) s.back[pair * R + r] = p.row_scale ? scale.back * p.row_scale[row + r] : scale.back;
#pragma unroll 1
    for (int i = own; trellis_chunk<C>(pair, i) < chunks; i += 128) {
      const int c = trellis_chunk<C>(pair, i);
      Chunk chunk = kept[r];
      if (i != own) chunk.load(row_in(p, row, count, r), c);
      float v[16];
      chunk.values(p.dtype, v);
      // To the nearest integer, in the low bits of 1.5 * 2^23; 128 more, so that the upper byte is the upper digit and the lower
      // one, less 128, the lower digit.
      auto both = [&](float value) {
        const uint32_t plus = __float_as_uint(__fmaf_rn(value, scale.scale, 12582912.f + 128.f));
        const uint32_t minus = __float_as_uint(__fmaf_rn(value, -scale.scale, 12582912.f + 128.f));
        return __byte_perm(plus, minus, 0x4051);  // upper digits, lower digits
      };
      char* const to = s.activations + c / 4 * C::kGroupBytes + c % 4 * 4 + r * 32;
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint32_t a = both(v[4 * j + 2 * m]), b = both(v[4 * j + 2 * m + 1]);
          char* const at = to + j * C::kStepBytes + m * C::kHalfStepBytes;
          *reinterpret_cast<uint32_t*>(at) = __byte_perm(a, b, 0x5410);
          *reinterpret_cast<uint32_t*>(at + 16) = __byte_perm(a, b, 0x7632) ^ 0x80808080u;
        }
    }
  }
  publish_barriers();  // for the tensor cores, which read shared memory as the copy engine does
  asm volatile("bar.sync %0, 128;\n" ::"r"(1 + wk) : "memory");
}

// A group's weights: of each byte of a lane's two words (columns g and g + 8) the four registers of A.
__device__ inline void trellis_decode(uint32_t left, uint32_t right, uint32_t before, uint32_t addend0, uint32_t addend1,
                                      uint32_t (&a)[4][4]) {
  trellis_words<0, 0>(left, before, addend0, addend1, a[0][0], a[0][2]);
  trellis_words<0, 1>(right, before, addend0, addend1, a[0][1], a[0][3]);
  trellis_words<1, 0>(left, 0, addend0, addend1, a[1][0], a[1][2]);
  trellis_words<1, 0>(right, 0, addend0, addend1, a[1][1], a[1][3]);
  trellis_words<2, 0>(left, 0, addend0, addend1, a[2][0], a[2][2]);
  trellis_words<2, 0>(right, 0, addend0, addend1, a[2][1], a[2][3]);
  trellis_words<3, 0>(left, 0, addend0, addend1, a[3][0], a[3][2]);
  trellis_words<3, 0>(right, 0, addend0, addend1, a[3][1], a[3][3]);
}

// d = a group's weights times its activations at `x`. By `wgmma`: is under way afterwards.
template <typename C>
__device__ void trellis_multiply(int (&d)[4], const uint32_t (&a)[4][4], const char* x) {
  if constexpr (C::kWgmma) {
    const uint64_t b = byte_descriptor(shared_address(x));
    wgmma_fence();
    wgmma_bytes<false>(d, a[0], b);
#pragma unroll
    for (int j = 1; j < 4; ++j) wgmma_bytes<true>(d, a[j], b + j * (C::kStepBytes / 16));
    wgmma_commit();
  } else {
    const char* const own = x + threadIdx.x % 32 / 4 * 16 + threadIdx.x % 4 * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t b0 = *reinterpret_cast<const uint32_t*>(own + j * C::kStepBytes);
      const uint32_t b1 = *reinterpret_cast<const uint32_t*>(own + j * C::kStepBytes + C::kHalfStepBytes);
      if (j == 0) mma_bytes(d, a[j][0], a[j][1], a[j][2], a[j][3], b0, b1, 0, 0);
      else mma_bytes(d, a[j][0], a[j][1], a[j][2], a[j][3], b0, b1);
    }
  }
}

// Main loop: this warpgroup's pairs of a tile; columns g and g + 8 of the warp's 16, row t.
template <typename C>
__device__ float2 trellis_few_main_loop(const FewShared<C>& s, TrellisRing<C>& ring, TrellisProducer<C>& producer, int pair, int wn,
                                        bool& first, uint32_t addend0, uint32_t addend1) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, all_pairs = (producer.blocks_k + 1) / 2;
  const int pairs = pair < all_pairs ? (all_pairs - pair + C::kWK - 1) / C::kWK : 0;
  // The last pair is one unit if K is an odd number of units and that pair is the tile's last.
  const int units = 2 * pairs - (producer.blocks_k % 2 && pairs > 0 && pair + (pairs - 1) * C::kWK == all_pairs - 1);
  const uint32_t selector = TrellisBefore::selector();
  int o[4] = {}, d[2][4];
  uint32_t a[2][4][4], scales, before;
  uint4 q;
  const char* stage = nullptr;
  const char* x = s.activations + 4 * pair * C::kGroupBytes;
  auto load = [&](int i) {  // unit i
    if (i % 2 == 0) stage = ring.wait() + wn * 512 + lane * 4;
    auto word = [&](int at) { return *reinterpret_cast<const uint32_t*>(stage + at); };
    q = make_uint4(word(0), word(128), word(256), word(384));
    scales = word(2048 - wn * 480 - lane * 4 + g * 4);
    stage += kTrellisUnitBytes;
    before = TrellisBefore(q, scales, selector).bytes;
    if (i % 2 == 1 || i + 1 == units) {
      ring.release();
      if (wn == 0 && !first) producer.request(ring);
      first = false;
    }
  };
  if (units > 0) {
    load(0);
    trellis_decode(q.x, q.y, before, addend0, addend1, a[0]);
#pragma unroll 1
    for (int i = 0; i < units; ++i) {
      trellis_multiply<C>(d[0], a[0], x);
      trellis_decode(q.z, q.w, before >> 16, addend0, addend1, a[1]);
      trellis_multiply<C>(d[1], a[1], x + C::kGroupBytes);
      const uint32_t own = scales;
      if (i + 1 < units) load(i + 1);
      if constexpr (C::kWgmma) wgmma_wait_for<1>(d[0]);
      const int f0 = own & 15, f1 = own >> 8 & 15, f2 = own >> 4 & 15, f3 = own >> 12 & 15;
      o[0] += f0 * d[0][0], o[1] += f0 * d[0][1], o[2] += f1 * d[0][2], o[3] += f1 * d[0][3];
      trellis_decode(q.x, q.y, before, addend0, addend1, a[0]);  // of the next unit; after the last one of the same again
      if constexpr (C::kWgmma) wgmma_wait_for<0>(d[1]);
      o[0] += f2 * d[1][0], o[1] += f2 * d[1][1], o[2] += f3 * d[1][2], o[3] += f3 * d[1][3];
      x += (i % 2 ? 4 * C::kWK - 2 : 2) * C::kGroupBytes;
    }
  }
  const float back = s.back[pair * C::kRows + t % C::kRows];
  return make_float2(fmaf(static_cast<float>(o[0]), 256.f, static_cast<float>(o[1])) * back,
                     fmaf(static_cast<float>(o[2]), 256.f, static_cast<float>(o[3])) * back);
}

// A tile's super scales into a slot. All lanes of one warp.
template <typename C>
__device__ void trellis_fetch_columns(const FewParams& p, const FewShared<C>& s, const FewRows& rows, int tile, int slot) {
  const int column_tiles = p.column_tiles.by, block = p.column_tiles.divide(tile), lane = threadIdx.x % 32;
  const int expert = block == rows.block ? rows.expert : min(expert_of<C>(s, block, rows.expert), p.experts - 1);
  const size_t first = (static_cast<size_t>(expert) * column_tiles + tile - block * column_tiles) * (C::kTiles * 16);
  if (lane < C::kColumnBytes / 16) copy16(s.columns + slot * C::kColumnBytes + lane * 16, p.columns + first + lane * 4);
  s.columns_full[slot].arrive_after_copies();
}

// Epilogue: one warp adds up all warpgroups' partial sums of a tile, in their order, and writes the result.
template <typename C>
__device__ void trellis_epilogue(const FewParams& p, const FewShared<C>& s, int tile, int begin, const FewRows& rows) {
  const int block = p.column_tiles.divide(tile);
  FewRows own{rows.expert, block};
  if (C::kRows == 1) own.expert = expert_of<C>(s, block, 0);
  else while (block < s.blocks[own.expert]) --own.expert;
  int first_row, count;
  own.place<C>(p, s, &first_row, &count);
  const int i = tile - begin, slot = i % C::kSumsSlots, first_column = (tile - block * p.column_tiles.by) * (C::kTiles * 16);
  s.columns_full[i % C::kColumnSlots].wait((i / C::kColumnSlots) & 1);
  const float* const supers = reinterpret_cast<const float*>(s.columns + i % C::kColumnSlots * C::kColumnBytes);
  const float2* const from = s.sums + slot * (C::kWK * C::kEntries);
  s.sums_ready[slot].wait((i / C::kSumsSlots) & 1);
  const int lane = threadIdx.x % 32, left = lane / 8 * 16 + lane % 8;  // columns `left` and `left` + 8
#pragma unroll
  for (int r = 0; r < C::kRows; ++r) {
    if (r >= count || first_column + left >= p.n) continue;
    float2 sum = from[lane * C::kRows + r];
#pragma unroll
    for (int w = 1; w < C::kWK; ++w) {
      const float2 v = from[w * C::kEntries + lane * C::kRows + r];
      sum.x += v.x, sum.y += v.y;
    }
    const size_t to = static_cast<size_t>(first_row + r) * p.n + first_column + left;
    store(p.out, p.dtype, to, sum.x * supers[left]);
    store(p.out, p.dtype, to + 8, sum.y * supers[left + 8]);
  }
  s.sums_free[slot].arrive_together();
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1) trellis_few_kernel(const FewParams p) {
  dependents_may_start();
  extern __shared__ __align__(128) char shared[];
  const int blocks_k = p.k / 128, column_tiles = p.column_tiles.by;
  const FewShared<C> s(shared, blocks_k, p.experts);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int wk = warp / C::kWN, wn = warp % C::kWN;
  TrellisRing<C> ring{s.rings + wk * (C::kStages * C::kStageBytes), s.full + wk * C::kStages};
  if (lane == 0) {
    if (wn == 0)
      for (int i = 0; i < C::kStages; ++i) ring.full[i].init(1), ring.empty()[i].init(C::kWN * kWarpArrivals);
    if (wn == 1 && wk < C::kColumnSlots) s.columns_full[wk].init(32);
    if (wn == 2 && wk < C::kSumsSlots) s.sums_ready[wk].init(C::kWarps * kWarpArrivals), s.sums_free[wk].init(kWarpArrivals);
    if (wn == 3 && wk == 0) s.rows_ready->init(C::kWarps * kWarpArrivals);
    publish_barriers();
  }
  const bool known = C::kRows == 1 || !p.offsets;
  int begin = blockIdx.x * p.each + min(static_cast<int>(blockIdx.x), p.longer);
  int end = begin + p.each + (static_cast<int>(blockIdx.x) < p.longer), first_block = p.column_tiles.divide(begin);
  if (p.offsets && static_cast<int>(threadIdx.x) * 16 < p.experts) prefetch_line(p.offsets + threadIdx.x * 16);
  wait_for_prerequisites();  // before any read: an earlier kernel may have written anything, weights included
  if (!known) {
    scan_offsets<C>(p, s, &begin, &end);
    first_block = p.column_tiles.divide(begin);
  }
  if (begin == end) return;
  FewRows rows{known ? 0 : uniform(s.start->expert), first_block};
  Chunk kept[C::kRows];
  trellis_load<C>(p, s, rows, wk, wn, kept);
  if (C::kRows == 1 && p.offsets) find_experts<C>(p, s, first_block, p.column_tiles.divide(end - 1));
  else if (!p.offsets && warp == 0) one_expert<C>(p, s, first_block, end);
  if (known) __syncthreads();
  if (C::kRows == 1) rows.expert = uniform(expert_of<C>(s, first_block, 0));
  TrellisProducer<C> producer{p, s, column_tiles, blocks_k, wk};
  producer.start(begin, end, first_block);
  producer.expert = rows.expert;
  if (warp < min(C::kColumnSlots, end - begin)) trellis_fetch_columns<C>(p, s, rows, begin + warp, warp);
  if (wn == 0)
#pragma unroll 1
    for (int i = 0; i < C::kStages; ++i) producer.request(ring);
  uint32_t addend0 = kTrellisAddend0, addend1 = kTrellisAddend1;
  asm volatile("" : "+r"(addend0), "+r"(addend1));
  bool first = true;  // nothing to request yet
  int finished = begin, pair = wk;
  for (int tile = begin; tile < end; ++tile, pair = TrellisProducer<C>::next_pair(pair, blocks_k)) {
    const int i = tile - begin, block = p.column_tiles.divide(tile), column_tile = tile - block * column_tiles;
    const bool change = i > 0 && column_tile == 0;
    if (change) {
      rows = FewRows{uniform(expert_of<C>(s, block, rows.expert)), block};
      trellis_load<C>(p, s, rows, pair, wn, kept);
      __syncthreads();  // the activations there are no longer read
    }
    if (change || i == 0) {
      trellis_convert<C>(p, s, rows, pair, wk, wn, kept);
      s.rows_ready->arrive_together();
    }
    // Slices of other warpgroups are first read in the tile after.
    if (!change && (column_tile == 1 || i == 1)) s.rows_ready->wait((block - first_block) & 1);
    const float2 out = trellis_few_main_loop<C>(s, ring, producer, pair, wn, first, addend0, addend1);
    const int slot = i % C::kSumsSlots, t = lane % 4;
    if (i >= C::kSumsSlots) s.sums_free[slot].wait((i / C::kSumsSlots + 1) & 1);
    float2* const to = s.sums + (slot * C::kWK + wk) * C::kEntries;
    if (t < C::kRows) to[(wn * 8 + lane / 4) * C::kRows + t] = out;
    s.sums_ready[slot].arrive_together();
    // The tile before, which all warps have left by now; at the end this one too.
#pragma unroll 1
    for (; finished <= (tile + 1 == end ? tile : tile - 1); ++finished)
      if ((finished - begin) % C::kWarps == warp) {
        trellis_epilogue<C>(p, s, finished, begin, rows);
        const int next = finished + C::kColumnSlots;
        if (next < end) trellis_fetch_columns<C>(p, s, rows, next, (finished - begin) % C::kColumnSlots);
      }
  }
}

}  // namespace ccq
