// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for few rows an expert: persistent, split along K, weights streamed through shared memory.
//
// Work. A tile has 16 * kR * kWarps columns and up to 8 * kNT rows (schedule.cuh). One that lies in several blocks'
// stretches is summed from fp32 partial results by whichever block finishes it last, always in the order of K: which
// block does it changes from run to run, the sum does not.
//
// Warps. A warp owns kR tiles of 16 columns; nothing is shared between warps and there is no block barrier after the
// start. Its weights come through a ring of kStages units in shared memory by cp.async, where each lane fetches the 16
// bytes that it will itself decode. The ring runs on across tile borders, so the memory pipe never drains. The warps
// of a block stand at about the same K of the same rows, so that activations, read straight into fragment registers,
// come from L1 for all of them but the first.
#pragma once

#include "decode.cuh"
#include "prepare.cuh"
#include "schedule.cuh"

namespace ccq {

struct GemmParams {
  const int64_t* offsets;
  const uint8_t* quant;
  const uint8_t* scales;
  const uint32_t* columns;
  Prepared prepared;
  float4* partial;
  void* out;
  int rows, k, n, experts, dtype;
};

template <Pairs kPairs_, int kR_, int kNT_, int kStages_, int kMinBlocks_>
struct Config {
  static constexpr Pairs kPairs = kPairs_;
  static constexpr int kR = kR_, kNT = kNT_, kStages = kStages_, kMinBlocks = kMinBlocks_;
  static constexpr int kWarps = 8, kThreads = kWarps * 32, kTileTokens = 8 * kNT;
  static constexpr int kTiles = kR * kWarps;  // 16-column tiles a block tile has
  // Shared memory of one warp: stages of quant [r][512] and scales [r][16]; then kStages + 1 tiles'
  // columns [r][192] (units of at most that many tiles are on their way or in work).
  static constexpr int kStageBytes = kR * 528, kColumnBytes = kR * 192;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kWarpBytes = kRingBytes + (kStages + 1) * kColumnBytes;
  static constexpr int kPartialFloat4 = kWarps * kR * kNT * 32;  // of one block and slot
  static size_t shared_bytes(int experts) { return kWarps * kWarpBytes + 2 * sizeof(int) * (experts + 1); }
};

template <typename C>
struct Warp {
  static constexpr int kR = C::kR, kStages = C::kStages;
  const GemmParams& p;
  const Routing routing;
  char* const ring;
  char* const ring_lane;  // ring + 16 * lane
  const int lane, warp, blocks_k, tiles_n;

  // The end of the ring where units are requested.
  int ahead_tile, ahead_kb, ahead_left, ahead_expert, ahead_stage, ahead_columns;
  int ahead_count;   // tiles in the group of four that this warp's tiles belong to
  int ahead_first;   // and the place of its first one there
  const uint8_t* ahead_quant;
  const uint8_t* ahead_scales;

  // Positions in the ring are byte offsets.
  __device__ static int next_stage(int at) { return at + C::kStageBytes == C::kRingBytes ? 0 : at + C::kStageBytes; }
  __device__ static int next_columns(int at) {
    return at + C::kColumnBytes == C::kWarpBytes ? C::kRingBytes : at + C::kColumnBytes;
  }
  __device__ int tile16(int column_tile) const { return column_tile * C::kTiles + warp * kR; }

  __device__ void aim() {  // at the tile ahead_tile, row block ahead_kb
    static_assert(4 % kR == 0, "a warp's tiles lie in one group of four");
    Tile t = routing.find(ahead_tile, ahead_expert, C::kTileTokens);
    ahead_expert = t.expert;
    // A warp right of the last column reads the last group and writes nothing.
    const int t16 = min(tile16(t.column_tile), (tiles_n - 1) / kR * kR);
    ahead_first = t16 % 4, ahead_count = min(4, tiles_n - t16 / 4 * 4);
    const size_t unit = ccq_unit_index(t.expert, t16, ahead_kb, tiles_n, blocks_k);
    ahead_quant = p.quant + unit * 512 + lane * 16;
    ahead_scales = p.scales + unit * 16 + lane * 16;
    const uint32_t* column = p.columns + (static_cast<size_t>(t.expert) * tiles_n + t16) * 48 + lane * 4;
#pragma unroll
    for (int r = 0; r < kR; ++r)
      if (lane < 12 && ahead_first + r < ahead_count) copy16(ring_lane + ahead_columns + r * 192, column + r * 48);
  }
  __device__ void request() {  // the next unit of the line, or nothing
    if (ahead_left > 0) {
      char* to = ring_lane + ahead_stage;
      // What lies past the right edge is not fetched: such tiles compute on leftovers and are not stored.
#pragma unroll
      for (int r = 0; r < kR; ++r)
        if (r == 0 || ahead_first + r < ahead_count) copy16(to + r * 512, ahead_quant + r * 512);
      if (lane < kR && ahead_first + lane < ahead_count) copy16(to + kR * 512, ahead_scales);
      ahead_quant += ahead_count * 512, ahead_scales += ahead_count * 16;
      ahead_stage = next_stage(ahead_stage);
      --ahead_left;
      if (++ahead_kb == blocks_k && ahead_left > 0) {
        ahead_kb = 0, ++ahead_tile;
        ahead_columns = next_columns(ahead_columns);
        aim();
      }
    }
    copy_commit();  // an empty group keeps the count of pending groups right at the end
  }
};

template <typename C, int kNT>
struct Accumulator {
  float o[C::kR][kNT][4];
};

__device__ inline uint4 load4(const __half* p) { return *reinterpret_cast<const uint4*>(p); }

// Units kb..kb_end of one tile into `acc`. kNT: blocks of 8 rows that this tile really has.
template <typename C, int kNT>
__device__ void multiply(Warp<C>& w, const Tile& tile, int kb, int kb_end, int& stage, int columns_at,
                         Accumulator<C, kNT>& acc) {
  constexpr int kR = C::kR;
  const GemmParams& p = w.p;
  const int g = w.lane / 4, t = w.lane % 4;
  const __half* x[kNT];
  const uint2* sums[kNT];
#pragma unroll
  for (int nt = 0; nt < kNT; ++nt) {
    // Rows past the end repeat the last one of their block, to fetch nothing for them; their results are not stored.
    const int n = min(nt, (tile.rows - 1) / 8), row = min(g, tile.rows - n * 8 - 1);
    const size_t block = tile.block + n;
    x[nt] = p.prepared.x + (block * p.k + kb * 128) * 8 + (row * 4 + t) * 8;
    sums[nt] = reinterpret_cast<const uint2*>(p.prepared.sums + (block * 8 + row) * (p.k / 64)) + kb;
  }
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc.o[r][nt][i] = 0.f;

  // A constant kept in a register: p.k is positive, but the compiler does not know.
  const uint32_t magic = kMagic | (p.k & 0x80000000u);
  const uint32_t sum_weights = t == 0 ? kSumWeights : 0;  // the sums' two parts are rows 0 and 1, lane t = 0's
  Column<C::kPairs> column[kR][2];
  bool first = true;
  for (; kb < kb_end; ++kb) {
    uint4 b[kNT][4];
    uint2 s[kNT];
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[nt][i] = load4(x[nt] + i * 256);
      s[nt] = *sums[nt]++;
      x[nt] += 1024;
    }
    copy_wait<C::kStages - 2>();
    __syncwarp();  // scales and columns were fetched by other lanes
    if (first) {
      first = false;
      const float* c = reinterpret_cast<const float*>(w.ring + columns_at);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        column[r][0] = Column<C::kPairs>(c[r * 48 + g], c[r * 48 + 16 + g]);
        column[r][1] = Column<C::kPairs>(c[r * 48 + g + 8], c[r * 48 + 24 + g]);
      }
    }
    uint4 q[kR];
    uint32_t scale[kR];
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      q[r] = *reinterpret_cast<const uint4*>(w.ring_lane + stage + r * 512);
      scale[r] = *reinterpret_cast<const uint16_t*>(w.ring + stage + kR * 512 + r * 16 + g * 2);
    }
    stage = Warp<C>::next_stage(stage);
    // The stage requested now is the one read in the last round, which every lane has left (the barrier above).
    w.request();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const uint32_t low = half ? q[r].z : q[r].x, high = half ? q[r].w : q[r].y;
        float d[kNT][4];
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt) mma_sums(d[nt], sum_weights, half ? s[nt].y : s[nt].x);
        {
          const Windows a(column[r][0].template codes<0>(low)), c(column[r][1].template codes<0>(high));
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) {
            const uint4 v = b[nt][half * 2];
            mma(d[nt], a.w[0], c.w[0], a.w[1], c.w[1], v.x, v.y);
            mma(d[nt], a.w[2], c.w[2], a.w[3], c.w[3], v.z, v.w);
          }
        }
        {
          const Windows a(column[r][0].template codes<1>(low)), c(column[r][1].template codes<1>(high));
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) {
            const uint4 v = b[nt][half * 2 + 1];
            mma(d[nt], a.w[0], c.w[0], a.w[1], c.w[1], v.x, v.y);
            mma(d[nt], a.w[2], c.w[2], a.w[3], c.w[3], v.z, v.w);
          }
        }
        const float f0 = half ? nibble<1>(scale[r], magic) : nibble<0>(scale[r], magic);
        const float f1 = half ? nibble<3>(scale[r], magic) : nibble<2>(scale[r], magic);
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt) {
          float* o = acc.o[r][nt];
          o[0] = fmaf(f0, d[nt][0], o[0]), o[1] = fmaf(f0, d[nt][1], o[1]);
          o[2] = fmaf(f1, d[nt][2], o[2]), o[3] = fmaf(f1, d[nt][3], o[3]);
        }
      }
    }
  }
}

__device__ inline void store(const GemmParams& p, size_t at, float v) {
  if (p.dtype == CCQ_BF16) static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16_rn(v);
  else static_cast<__half*>(p.out)[at] = __float2half_rn(v);
}

// A finished tile: super scale (and the 2^24 of the subnormals), the row's scale, rounding, output.
template <typename C, int kNT, typename W>
__device__ void write_out(W& w, const Tile& tile, const float (&super)[C::kR][2], Accumulator<C, kNT>& acc) {
  const GemmParams& p = w.p;
  const int g = w.lane / 4, t = w.lane % 4;
#pragma unroll
  for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = nt * 8 + 2 * t + i;
      if (token >= tile.rows) continue;
      const float row_scale = p.prepared.row_scale[tile.row + token];
      const size_t base = static_cast<size_t>(tile.row + token) * p.n;
#pragma unroll
      for (int r = 0; r < C::kR; ++r) {
        const int t16 = w.tile16(tile.column_tile) + r;
        if (t16 >= w.tiles_n) continue;
        store(p, base + t16 * 16 + g, acc.o[r][nt][i] * super[r][0] * row_scale);
        store(p, base + t16 * 16 + g + 8, acc.o[r][nt][2 + i] * super[r][1] * row_scale);
      }
    }
}

// Leaves this block's share of a tile in the workspace. True in the last block to do so, with the tile's sum in `acc`.
template <typename C, int kNT, typename W>
__device__ bool combine(W& w, int rows, int first_block, int last_block, Accumulator<C, kNT>& acc) {
  const GemmParams& p = w.p;
  // A block has at most two shared tiles: the one that its stretch begins in (slot 0) and the one it ends in (slot 1).
  auto at = [&](int block) {
    return p.partial + (static_cast<size_t>(block * 2 + (block == first_block)) * C::kWarps + w.warp) *
                           (C::kPartialFloat4 / C::kWarps) + w.lane;
  };
  float4* mine = at(blockIdx.x);
  // Only the rows that the tile has: most tiles of a decoding step have one or two.
  auto has = [&](int nt) { return nt * 8 + w.lane % 4 * 2 < rows; };
#pragma unroll
  for (int r = 0; r < C::kR; ++r)
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
      const float* o = acc.o[r][nt];
      if (has(nt)) __stcg(mine + (r * kNT + nt) * 32, make_float4(o[0], o[1], o[2], o[3]));
    }
  __threadfence();
  __syncwarp();
  int arrived = 0;
  if (w.lane == 0) arrived = atomicAdd(p.prepared.tickets + first_block * C::kWarps + w.warp, 1);
  arrived = __shfl_sync(~0u, arrived, 0);
  if (arrived != last_block - first_block) return false;
  __threadfence();
#pragma unroll
  for (int r = 0; r < C::kR; ++r)
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc.o[r][nt][i] = 0.f;
  // Several blocks' results on their way at once; added in order.
  constexpr int kBatch = kNT == 1 ? 4 : 1;
  for (int base = first_block; base <= last_block; base += kBatch) {
    float4 v[kBatch][C::kR * kNT];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float4* from = at(min(base + i, last_block));
#pragma unroll
      for (int j = 0; j < C::kR * kNT; ++j) v[i][j] = __ldcg(from + j * 32);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int j = 0; j < C::kR * kNT; ++j) {
        float* o = acc.o[j / kNT][j % kNT];
        if (base + i <= last_block) o[0] += v[i][j].x, o[1] += v[i][j].y, o[2] += v[i][j].z, o[3] += v[i][j].w;
      }
  }
  return true;
}

template <typename C, int kNT>
__device__ void run_tile(Warp<C>& w, const Tile& tile, int kb, int kb_end, int& stage, int columns_at,
                         int first_block, int last_block) {
  Accumulator<C, kNT> acc;
  multiply<C, kNT>(w, tile, kb, kb_end, stage, columns_at, acc);
  // Read here and not before the loop, to keep them out of its registers; the slot stays until the tile is done.
  float super[C::kR][2];
  const float* c = reinterpret_cast<const float*>(w.ring + columns_at);
#pragma unroll
  for (int r = 0; r < C::kR; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i) super[r][i] = c[r * 48 + 32 + w.lane / 4 + 8 * i] * (i ? 16777216.f * kUpperColumns : 16777216.f);
  if (first_block != last_block && !combine<C, kNT>(w, tile.rows, first_block, last_block, acc)) return;
  write_out<C, kNT>(w, tile, super, acc);
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) gemm_kernel(const GemmParams p) {
  extern __shared__ __align__(16) char shared[];
  int* blocks = reinterpret_cast<int*>(shared + C::kWarps * C::kWarpBytes);
  int* rows = blocks + p.experts + 1;
  scan_offsets<C::kThreads>(p.offsets, p.experts, p.rows, C::kTileTokens, blocks, rows);

  const int blocks_k = p.k / 128, tiles_n = p.n / 16;
  const Routing routing{blocks, rows, (tiles_n + C::kTiles - 1) / C::kTiles};
  const int tiles = blocks[p.experts] * routing.column_tiles;
  const int parts = parts_of(tiles, blocks_k, gridDim.x);
  // With less than one part a block the rest stays out, so that every block of a tile's stretch has a share in it.
  const int total = tiles * parts;
  const Split split{total, min(static_cast<int>(gridDim.x), total)};
  if (static_cast<int>(blockIdx.x) >= split.grid) return;
  const int begin = split.begin(blockIdx.x), end = split.begin(blockIdx.x + 1);
  auto kb_of = [&](int part) { return part % parts * blocks_k / parts; };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char* const ring = shared + warp * C::kWarpBytes;
  Warp<C> w{p, routing, ring, ring + lane * 16, lane, warp, blocks_k, tiles_n};
  int tile_index = begin / parts, kb = kb_of(begin);
  int left = (end / parts - tile_index) * blocks_k + kb_of(end) - kb;
  int expert = routing.expert_of(tile_index, p.experts);
  w.ahead_tile = tile_index, w.ahead_kb = kb, w.ahead_left = left, w.ahead_expert = expert;
  w.ahead_stage = 0, w.ahead_columns = C::kRingBytes;
  w.aim();
#pragma unroll
  for (int i = 0; i < C::kStages - 1; ++i) w.request();
  // Weights and offsets do not depend on the kernel before this one, activations and tickets do.
  wait_for_prerequisites();

  int stage = 0, columns_at = C::kRingBytes;
  while (left > 0) {
    const Tile tile = routing.find(tile_index, expert, C::kTileTokens);
    expert = tile.expert;
    const int kb_end = min(blocks_k, kb + left);
    int first_block = blockIdx.x, last_block = blockIdx.x;
    if (kb > 0 || kb_end < blocks_k) {
      first_block = split.owner(tile_index * parts);
      last_block = split.owner(tile_index * parts + parts - 1);
    }
    if (C::kNT == 1 || tile.rows <= 8)
      run_tile<C, 1>(w, tile, kb, kb_end, stage, columns_at, first_block, last_block);
    else if (C::kNT == 2 || tile.rows <= 16)
      run_tile<C, C::kNT < 2 ? C::kNT : 2>(w, tile, kb, kb_end, stage, columns_at, first_block, last_block);
    else
      run_tile<C, C::kNT>(w, tile, kb, kb_end, stage, columns_at, first_block, last_block);
    columns_at = Warp<C>::next_columns(columns_at);
    left -= kb_end - kb;
    kb = 0, ++tile_index;
  }
}

}  // namespace ccq
