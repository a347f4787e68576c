// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for one to four rows an expert: what a decoding step needs, in a single launch.
//
// Work. A tile is (expert, up to kMaxRows of its rows, 16 * kTiles columns) and all of K. Blocks take equal runs of tiles,
// columns fastest, so that a block converts activations to fp16 (in shared memory, all of K) once or twice in its life.
// No kernel runs before, no tile is cut across blocks.
//
// Warps. A tile's K is dealt out to kWK warps in pairs of units (2 x 128 rows); the deal goes on from tile to tile, so
// that over a few tiles all warps get the same. Each warp fetches its own weights through its own ring (ring.cuh), which
// runs on across tiles: the memory never waits for a tile's end. Nothing but the sums of a tile ties warps together, and
// those go through kSumsSlots buffers: a warp leaves its share and goes on, another one adds up the tile before.
//
// Few rows leave most of a tensor step's 8 columns (B's) empty. They carry other groups instead: with R rows a tile's
// 8 columns are 8 / R groups ("slots") of R rows. A step of group j has zeros in the columns of other slots, so that one
// accumulator collects 8 / R groups side by side. Scales, which multiply accumulators, then cost 8 / R times less.
#pragma once

#include "prepare.cuh"
#include "ring.cuh"
#include "schedule.cuh"

namespace ccq {

struct FewParams {
  const void* x;
  const int64_t* offsets;
  const uint8_t* quant;
  const uint8_t* scales;
  const uint32_t* columns;
  const float* row_scale;
  void* out;
  int rows, k, n, experts, dtype, fastdeploy;
};

template <Pairs kPairs_, int kR_, int kWK_, int kWN_, int kMaxRows_, int kStages_>
struct FewConfig {
  static constexpr Pairs kPairs = kPairs_;
  static constexpr int kR = kR_, kWK = kWK_, kWN = kWN_, kMaxRows = kMaxRows_, kStages = kStages_;
  static constexpr int kWarps = kWK * kWN, kThreads = kWarps * 32, kTiles = kR * kWN;
  static constexpr int kColumnSlots = 3, kSumsSlots = kMaxRows == 2 ? 3 : 2;
  static constexpr int kPlanes = kPairs == Pairs::kGeneral ? 2 : 1, kColumnBytes = kTiles * kPlaneBytes * kPlanes;
  static constexpr int kEntries = kTiles * 8 * (kMaxRows / 2);  // float4 that a warp's share of a tile takes
  static constexpr int kBarriers = kWarps * kStages + kColumnSlots + 2 * kSumsSlots;
  // 256 bytes a row and unit of 128 rows; 32 bytes of zeros a unit.
  __host__ __device__ static constexpr int activation_bytes(int blocks_k) { return blocks_k * (256 * kMaxRows + 32); }
  static size_t shared_bytes(int k, int experts) {
    const int blocks_k = k / 128;
    return kWarps * Ring<kR, kStages>::kBytes + kColumnSlots * kColumnBytes + kSumsSlots * kWK * kEntries * 16 +
           activation_bytes(blocks_k) + (blocks_k + 1) / 2 * 2 * 32 + kBarriers * 8 + (kWarps + 1) * kMaxRows * 4 +
           2 * sizeof(int) * (experts + 1);
  }
};

// Where things lie in shared memory.
template <typename C>
struct FewShared {
  char *rings, *columns, *activations;
  float4* sums;           // [kSumsSlots][kWK][kEntries]
  __half2* group_sums;    // of the activations, in the order of the slots: [K/256 or K/128][8]
  Barrier *full, *columns_full, *sums_ready, *sums_free;
  float* back;            // [kMaxRows]: undoes a row's scale, times the caller's row scale
  uint32_t* largest;      // [kWarps][kMaxRows]
  int *blocks, *rows;     // prefix sums over experts (schedule.cuh)

  __device__ FewShared(char* at, int blocks_k, int experts) {
    auto take = [&at](int bytes) { char* p = at; at += bytes; return p; };
    rings = take(C::kWarps * Ring<C::kR, C::kStages>::kBytes);
    columns = take(C::kColumnSlots * C::kColumnBytes);
    sums = reinterpret_cast<float4*>(take(C::kSumsSlots * C::kWK * C::kEntries * 16));
    activations = take(C::activation_bytes(blocks_k));
    group_sums = reinterpret_cast<__half2*>(take((blocks_k + 1) / 2 * 2 * 32));
    full = reinterpret_cast<Barrier*>(take(C::kWarps * C::kStages * 8));
    columns_full = reinterpret_cast<Barrier*>(take(C::kColumnSlots * 8));
    sums_ready = reinterpret_cast<Barrier*>(take(C::kSumsSlots * 8));
    sums_free = reinterpret_cast<Barrier*>(take(C::kSumsSlots * 8));
    back = reinterpret_cast<float*>(take(C::kMaxRows * 4));
    largest = reinterpret_cast<uint32_t*>(take(C::kWarps * C::kMaxRows * 4));
    blocks = reinterpret_cast<int*>(take(4 * (experts + 1)));
    rows = reinterpret_cast<int*>(take(4 * (experts + 1)));
  }
};

// A warp's walk over the units of its tiles, at the end of the ring where they are ordered.
template <typename C>
struct FewFetch {
  const FewParams& p;
  const int* blocks;  // FewShared
  const int end, column_tiles, tiles_n, blocks_k, wk, wn;
  int tile, block, column, pair, expert;  // pair: the first one that this warp has in the tile
  int kb = 0, stride = 0, tiles = 0;      // stride: units from one block of 128 rows to the next
  uint32_t unit = 0;

  __device__ int next_pair(int pair_) const { return (pair_ - (blocks_k + 1) / 2) & (C::kWK - 1); }

  __device__ void aim() {  // at the first unit of `tile`, or of a later one where this warp has any
    static_assert(4 % C::kR == 0, "a warp's tiles lie in one group of four");
    while (tile < end && 2 * pair >= blocks_k) advance();
    kb = tile < end ? 2 * pair : blocks_k;
    while (block >= blocks[expert + 1] && expert + 1 < p.experts) ++expert;
    // A warp right of the last column reads the last tiles and writes nothing.
    const int t16 = min(column * C::kTiles + wn * C::kR, (tiles_n - 1) / C::kR * C::kR);
    stride = min(4, tiles_n - t16 / 4 * 4), tiles = min(C::kR, stride - t16 % 4);
    unit = static_cast<uint32_t>(ccq_unit_index(expert, t16, kb, tiles_n, blocks_k));
  }
  __device__ void advance() {
    ++tile, pair = next_pair(pair);
    if (++column == column_tiles) column = 0, ++block;
  }
  __device__ void request(Ring<C::kR, C::kStages>& ring, int ahead = 0) {  // the next unit, or nothing
    if (kb < blocks_k) {
      ring.fetch(p.quant + static_cast<size_t>(unit) * 512, p.scales + static_cast<size_t>(unit) * 16, tiles, ahead);
      const int step = kb % 2 ? 2 * C::kWK - 1 : 1;
      kb += step, unit += step * stride;
      if (kb >= blocks_k) advance(), aim();
    }
    ring.commit();
  }
};

// `count` rows from `first` become fp16 in shared memory, laid out for R rows a tile. All threads of the block.
template <typename C, int R, typename T>
__device__ void convert_rows(const FewParams& p, const FewShared<C>& s, int first, int count) {
  const int chunks = p.k / 16, blocks_k = p.k / 128;
  const T* from = static_cast<const T*>(p.x) + static_cast<size_t>(first) * p.k;
  uint32_t largest[R] = {};
  float kept[R][16] = {};  // the first chunk of each row that a thread reads; the others are read twice
  auto take = [&](int c, int r, float (&v)[16]) {  // a row that is not there: the last one again, whose results are not stored
    load_chunk(from + static_cast<size_t>(min(r, count - 1)) * p.k, c, p.fastdeploy, v);
  };
  auto widen = [&](int r, const float (&v)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) largest[r] = max(largest[r], __float_as_uint(v[i]) & 0x7FFFFFFFu);
  };
  if (static_cast<int>(threadIdx.x) < chunks) {
#pragma unroll
    for (int r = 0; r < R; ++r) take(threadIdx.x, r, kept[r]);
#pragma unroll
    for (int r = 0; r < R; ++r) widen(r, kept[r]);
  }
  for (int c = threadIdx.x + C::kThreads; c < chunks; c += C::kThreads)
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float v[16];
      take(c, r, v);
      widen(r, v);
    }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    largest[r] = __reduce_max_sync(~0u, largest[r]);
    if (threadIdx.x % 32 == 0) s.largest[threadIdx.x / 32 * R + r] = largest[r];
  }
  // Zeros of each unit, and the sums of groups that are not there (an odd number of units, two units a slot).
  for (int i = threadIdx.x; i < blocks_k * 2; i += C::kThreads)
    *reinterpret_cast<uint4*>(s.activations + i / 2 * (256 * R + 32) + 256 * R + i % 2 * 16) = make_uint4(0, 0, 0, 0);
  if (R == 2 && blocks_k % 2 && threadIdx.x < 4)
    s.group_sums[blocks_k / 2 * 8 + 4 + threadIdx.x] = __halves2half2(__ushort_as_half(0), __ushort_as_half(0));
  __syncthreads();
  float scale[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    largest[r] = 0;
    for (int w = 0; w < C::kWarps; ++w) largest[r] = max(largest[r], s.largest[w * R + r]);
    const RowScale own(largest[r]);
    scale[r] = own.scale;
    if (static_cast<int>(threadIdx.x) == r)
      s.back[r] = p.row_scale ? own.back * p.row_scale[first + min(r, count - 1)] : own.back;
  }
  // Quads share a group, so whole warps walk the loop together and guard inside it.
  for (int c0 = 0; c0 < chunks; c0 += C::kThreads) {
    const int c = c0 + threadIdx.x, group = c / 4, t = c % 4;
    const float odd = group % 2 ? kOddGroup : 1.f;
    char* const unit = s.activations + c / 8 * (256 * R + 32) + group % 2 * (128 * R) + t * 32;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float v[16], sum = 0.f;
      if (c0 > 0 && c < chunks) take(c, r, v);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        v[i] = c < chunks ? (c0 == 0 ? kept[r][i] : v[i]) * scale[r] : 0.f;
        sum += v[i];
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (c >= chunks) continue;
      constexpr int kGroups = 8 / R;
      if (t == 0) s.group_sums[group / kGroups * 8 + group % kGroups * R + r] = sum_parts(sum, odd);
#pragma unroll
      for (int h = 0; h < 2; ++h) *reinterpret_cast<uint4*>(unit + r * 128 + h * 16) = fragment_half(v, h, odd);
    }
  }
  __syncthreads();
}

// This warp's units of a tile into `o`: of columns g and g + 8 of each of kR tiles, rows (2t, 2t + 1) % R, the groups of
// this lane's slot.
template <typename C, int R>
__device__ void multiply_few(const FewShared<C>& s, Ring<C::kR, C::kStages>& ring, FewFetch<C>& fetch, int pair,
                             const Column<C::kPairs> (&column)[C::kR][2], float (&o)[C::kR][4]) {
  constexpr int kR = C::kR, kUnit = 256 * R + 32, kZeros = 256 * R;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, blocks_k = fetch.blocks_k;
  const int slot = g / R, mine = g % R * 128 + t * 32;  // of this lane's column of B
  // Nibbles of this lane's accumulators: their slot's group is even or odd, in the first or the second unit (R = 2).
  const int parity = R == 2 ? t % 2 : t / 2;
  const uint32_t lower = 0xFu << 4 * parity, upper = 0xF00u << 4 * parity;
  const uint32_t magic = kMagic | (static_cast<uint32_t>(blocks_k) & 0x80000000u);  // a register: blocks_k is positive
  const uint32_t sum_weights = t == 0 ? kSumWeights : 0;  // the sums' two parts are rows 0 and 1, lane t = 0's
  auto nibble_of = [magic](uint32_t word, uint32_t mask) { return __uint_as_float((word & mask) | magic) - 8388608.f; };

  for (; 2 * pair < blocks_k; pair += C::kWK) {
    float d[kR][4];
    uint32_t scale[kR];
    auto scaled = [&] {
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const float f0 = nibble_of(scale[r], lower), f1 = nibble_of(scale[r], upper);
        o[r][0] = fmaf(f0, d[r][0], o[r][0]), o[r][1] = fmaf(f0, d[r][1], o[r][1]);
        o[r][2] = fmaf(f1, d[r][2], o[r][2]), o[r][3] = fmaf(f1, d[r][3], o[r][3]);
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
        if (R == 4 || u == 0 || t >= 2) scale[r] = *reinterpret_cast<const uint16_t*>(unit + kR * 512 + r * 16 + g * 2);
      }
      __syncwarp();  // every lane has what it needs of the stage
      fetch.request(ring);
      ring.next();
      if (R == 4 || u == 0) {
        const uint32_t sums = *reinterpret_cast<const uint32_t*>(s.group_sums + (R == 4 ? kb : pair) * 8 + g);
#pragma unroll
        for (int r = 0; r < kR; ++r) mma_sums(d[r], sum_weights, sums);
      }
      const char* const x = s.activations + kb * kUnit;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const char* const at = x + (slot == (R == 2 ? 2 * u + half : half) ? half * (128 * R) + mine : kZeros);
        const uint4 b0 = *reinterpret_cast<const uint4*>(at), b1 = *reinterpret_cast<const uint4*>(at + 16);
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          const uint32_t low = half ? q[r].z : q[r].x, high = half ? q[r].w : q[r].y;
          {
            const Windows a(column[r][0].template codes<0>(low)), c(column[r][1].template codes<0>(high));
            mma(d[r], a.w[0], c.w[0], a.w[1], c.w[1], b0.x, b0.y);
            mma(d[r], a.w[2], c.w[2], a.w[3], c.w[3], b0.z, b0.w);
          }
          {
            const Windows a(column[r][0].template codes<1>(low)), c(column[r][1].template codes<1>(high));
            mma(d[r], a.w[0], c.w[0], a.w[1], c.w[1], b1.x, b1.y);
            mma(d[r], a.w[2], c.w[2], a.w[3], c.w[3], b1.z, b1.w);
          }
        }
      }
      if (R == 4) scaled();
    }
    if (R == 2) scaled();
  }
  // Slots together: lanes t and t ^ 2 have the same rows, with R = 2 all four lanes of a quad.
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      o[r][i] += __shfl_xor_sync(~0u, o[r][i], 2);
      if (R == 2) o[r][i] += __shfl_xor_sync(~0u, o[r][i], 1);
    }
}

// Rows that are in shared memory.
struct FewRows {
  int expert, block, row, count;
};

// A tile's columns into a slot; `expert` goes along with the tiles. All lanes of one warp.
template <typename C>
__device__ void fetch_columns(const FewParams& p, const FewShared<C>& s, int& expert, int tile, int slot,
                              int column_tiles, int tiles_n) {
  const int block = tile / column_tiles;
  while (block >= s.blocks[expert + 1]) ++expert;
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
__device__ void finish_tile(const FewParams& p, const FewShared<C>& s, int tile, int begin, const FewRows& rows,
                            int column_tiles, int tiles_n) {
  const int i = tile - begin, slot = i % C::kSumsSlots;
  const int t16 = (tile - tile / column_tiles * column_tiles) * C::kTiles;
  const char* const columns = s.columns + i % C::kColumnSlots * C::kColumnBytes;
  const float4* const from = s.sums + slot * (C::kWK * C::kEntries);
  const int pairs_of_rows = C::kMaxRows == 4 && rows.count > 2 ? 2 : 1;
  s.sums_ready[slot].wait((i / C::kSumsSlots) & 1);
  for (int e = threadIdx.x % 32; e < C::kTiles * 8 * pairs_of_rows; e += 32) {
    float4 sum = from[e];
    for (int w = 1; w < C::kWK; ++w) {
      const float4 v = from[w * C::kEntries + e];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const int row = e % pairs_of_rows * 2, g = e / pairs_of_rows % 8, r = e / pairs_of_rows / 8;
    if (t16 + r >= tiles_n) continue;
    const float2 super = load_supers(columns + r * kPlaneBytes, g);
    const float values[2][2] = {{sum.x, sum.z}, {sum.y, sum.w}};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (row + j >= rows.count) continue;
      const float back = s.back[row + j] * 16777216.f;
      const size_t to = static_cast<size_t>(rows.row + row + j) * p.n + (t16 + r) * 16 + g;
      const float v0 = values[j][0] * super.x * back, v1 = values[j][1] * (super.y * kUpperColumns) * back;
      if (p.dtype == CCQ_BF16) {
        static_cast<__nv_bfloat16*>(p.out)[to] = __float2bfloat16_rn(v0);
        static_cast<__nv_bfloat16*>(p.out)[to + 8] = __float2bfloat16_rn(v1);
      } else {
        static_cast<__half*>(p.out)[to] = __float2half_rn(v0);
        static_cast<__half*>(p.out)[to + 8] = __float2half_rn(v1);
      }
    }
  }
  __syncwarp();
  if (threadIdx.x % 32 == 0) s.sums_free[slot].arrive();
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1) few_kernel(const FewParams p) {
  extern __shared__ __align__(128) char shared[];
  constexpr int kR = C::kR;
  const int blocks_k = p.k / 128, tiles_n = p.n / 16, column_tiles = (tiles_n + C::kTiles - 1) / C::kTiles;
  const FewShared<C> s(shared, blocks_k, p.experts);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kWarps * C::kStages; ++i) s.full[i].init(1);
    for (int i = 0; i < C::kColumnSlots; ++i) s.columns_full[i].init(32);
    for (int i = 0; i < C::kSumsSlots; ++i) s.sums_ready[i].init(C::kWarps), s.sums_free[i].init(1);
    publish_barriers();
  }
  wait_for_prerequisites();  // before any read: an earlier kernel may have written anything, weights included
  scan_offsets<C::kThreads>(p.offsets, p.experts, p.rows, C::kMaxRows, s.blocks, s.rows);

  const int tiles = s.blocks[p.experts] * column_tiles, grid = gridDim.x, own = blockIdx.x;
  const int each = tiles / grid, longer = tiles % grid;
  const int begin = own * each + min(own, longer), end = begin + each + (own < longer);
  if (begin == end) return;
  const int expert = expert_of_block(s.blocks, p.experts, begin / column_tiles);

  const int wk = warp % C::kWK, wn = warp / C::kWK;
  Ring<kR, C::kStages> ring(s.rings + warp * Ring<kR, C::kStages>::kBytes, s.full + warp * C::kStages);
  const int first_block = begin / column_tiles;
  FewFetch<C> fetch{p, s.blocks, end, column_tiles, tiles_n, blocks_k, wk, wn,
                    begin, first_block, begin - first_block * column_tiles, wk, expert};
  fetch.aim();
#pragma unroll
  for (int i = 0; i < C::kStages; ++i) fetch.request(ring, i);
  int ahead = expert;  // of the tile whose columns are fetched
  if (warp == 0)
    for (int i = 0; i < min(C::kColumnSlots, end - begin); ++i)
      fetch_columns<C>(p, s, ahead, begin + i, i, column_tiles, tiles_n);

  FewRows rows{expert, -1, 0, 0};
  int finished = begin, pair = wk;
  for (int tile = begin; tile < end; ++tile, pair = fetch.next_pair(pair)) {
    const int i = tile - begin, block = tile / column_tiles, column_tile = tile - block * column_tiles;
    if (block != rows.block) {  // all tiles before are finished (below)
      rows.block = block;
      while (block >= s.blocks[rows.expert + 1]) ++rows.expert;
      rows.row = s.rows[rows.expert] + (block - s.blocks[rows.expert]) * C::kMaxRows;
      rows.count = min(C::kMaxRows, s.rows[rows.expert + 1] - rows.row);
      if (i > 0) __syncthreads();  // the activations there are no longer read
      auto convert = [&](auto type) {
        using T = decltype(type);
        if (C::kMaxRows == 4 && rows.count > 2) convert_rows<C, C::kMaxRows, T>(p, s, rows.row, rows.count);
        else convert_rows<C, 2, T>(p, s, rows.row, rows.count);
      };
      if (p.dtype == CCQ_BF16) convert(__nv_bfloat16{}); else convert(__half{});
    }
    Column<C::kPairs> column[kR][2];
    const char* const columns = s.columns + i % C::kColumnSlots * C::kColumnBytes + wn * kR * kPlaneBytes;
    s.columns_full[i % C::kColumnSlots].wait((i / C::kColumnSlots) & 1);
#pragma unroll
    for (int r = 0; r < kR; ++r)
      load_columns<C::kPairs>(columns + r * kPlaneBytes, columns + (C::kTiles + r) * kPlaneBytes, lane / 4, column[r]);

    float o[kR][4] = {};
    const bool four = C::kMaxRows == 4 && rows.count > 2;
    if (four) multiply_few<C, C::kMaxRows>(s, ring, fetch, pair, column, o);
    else multiply_few<C, 2>(s, ring, fetch, pair, column, o);

    const int slot = i % C::kSumsSlots;
    if (i >= C::kSumsSlots) s.sums_free[slot].wait((i / C::kSumsSlots + 1) & 1);
    float4* const to = s.sums + (slot * C::kWK + wk) * C::kEntries + wn * kR * 8 * (four ? 2 : 1);
    const int t = lane % 4;
    if (t < (four ? 2 : 1))
#pragma unroll
      for (int r = 0; r < kR; ++r)
        to[(r * 8 + lane / 4) * (four ? 2 : 1) + t] = make_float4(o[r][0], o[r][1], o[r][2], o[r][3]);
    __syncwarp();
    if (lane == 0) s.sums_ready[slot].arrive();
    // The tile before, which all warps have left by now; at the end of these rows this one too.
    const int until = column_tile + 1 == column_tiles || tile + 1 == end ? tile : tile - 1;
    for (; finished <= until; ++finished)
      if ((finished - begin) % C::kWarps == warp) {
        finish_tile<C>(p, s, finished, begin, rows, column_tiles, tiles_n);
        const int next = finished + C::kColumnSlots;
        if (next < end) fetch_columns<C>(p, s, ahead, next, (finished - begin) % C::kColumnSlots, column_tiles, tiles_n);
      }
  }
}

}  // namespace ccq
