// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM for one to eight rows of several experts, on Hopper (sm_90a): moe_few.cuh's arithmetic, fed otherwise.
//
// Work. A tile is (expert, kRows of its rows or fewer, 64 columns) and all of K. Blocks take contiguous ranges of tiles, equal
// ones or, where an expert's rows decide how long a tile takes, of equal weight. A stage is kUnits units of 128 input rows of all
// 64 columns: contiguous in memory, so that one copy of 8 KB brings its codes. A tile's columns and all its scales come together.
//
// Warps. Two request. Sixteen multiply, in four teams: the stages of a range go to the teams in turn, whatever tile they belong to,
// and each warp of a team has 16 of the 64 columns. One adds up the teams' sums of a tile and writes them. So the warps that multiply
// are short of nothing but instructions, and what they need of shared memory they ask for a group ahead.
//
// Activations become two digits of 8 bits in blocks of 512 values of a row, each with a scale of its own (prepare.cuh); so a stage's
// sums are scaled and added up as float32. Groups share accumulators where a tile has one row or two (moe_few.cuh, "slots").
#pragma once

#include "few_schedule.cuh"
#include "wgmma.cuh"  // registers from warps to warps

namespace ccq {

// What the scan of offsets finds, and what its warps tell each other.
struct StreamStart {
  int expert, block, begin, end, of_warp[16], weight_of_warp[16];
};

template <Pairs kPairs_, int kRows_>
struct StreamFew {
  static constexpr Pairs kPairs = kPairs_;
  static constexpr int kRows = kRows_, kUnits = 4;
  static constexpr int kNT = kRows > 4 ? kRows / 4 : 1;      // 8-column blocks of the second operand
  static constexpr int kGroups = kRows < 4 ? 4 / kRows : 1;  // groups that share an accumulator (moe_few.cuh, "slots")
  static constexpr int kWarps = 16, kThreads = kWarps * 32, kAllThreads = kThreads + 128;
  static constexpr int kProducers = 2, kProducer = kWarps, kWriter = kProducer + kProducers;
  // Registers of a thread: 96 at the beginning; then those of the warps that request and write, and of those that multiply.
  static constexpr int kOtherRegisters = 64, kConsumerRegisters = 104;
  static constexpr int kSlices = 4, kTiles = 4;  // teams, which divide a tile's K; 16-column tiles
  static constexpr int kUnitBytes = kTiles * 512;  // codes of a unit of all columns
  static constexpr int kStageBytes = kUnits * kUnitBytes;
  // Copies on their way: up to 98 KB of a multiprocessor's.
  static constexpr int kUsualStages = 48 / kUnits, kLeastStages = kSlices;
  static constexpr int kMostStages = 32, kMostColumns = 8, kMostSums = 4;
  static constexpr int kPlanes = kPairs == Pairs::kGeneral ? 2 : 1;
  // Of a tile: its columns, then its scales, [units][kTiles * 16].
  static constexpr int kColumnBytes = kTiles * kPlaneBytes * kPlanes, kUnitScales = kTiles * 16;
  __host__ __device__ static constexpr int column_bytes(int k) { return kColumnBytes + (k / 128 + kUnits - 1) / kUnits * kUnits * kUnitScales; }
  static constexpr int kRowEntries = kTiles * 8 + 4, kEntries = kRows * kRowEntries;  // float2 of one slice's sums, of a row
  // Digits of a 64-group: [kNT][8 columns][4 lanes of a quad][16 bytes]. Groups lie 16 bytes further apart, so that the same
  // bytes of neighbouring groups are in different banks.
  static constexpr int kGroupBytes = 512 * kNT + 16, kOffsetBytes = 64 * kNT;
  static constexpr int kKept = kRows < 4 ? kRows : 4;  // chunks that a lane loads at once
  static constexpr int kBarriers = 2 * kMostStages + 2 * kMostColumns + 2 * kMostSums;
  // Time of a tile by its rows, about: where the host does not know the blocks' ranges, they are of equal weight.
  static constexpr int kMostWeight = kRows == 8 ? 11 : 8;
  __host__ __device__ static constexpr int weight(int rows) { return rows <= 4 ? 8 : 11; }
  static_assert(kMaxExperts % kThreads == 0, "the scans of offsets are made for that");

  __host__ __device__ static constexpr int quads(int k) { return (k + 511) / 512; }
  __host__ __device__ static constexpr int stages_of(int k) { return (k / 128 + kUnits - 1) / kUnits; }
  // A team that has no part in every tile needs more of them, or it would mistake one round of a barrier for another.
  __host__ __device__ static constexpr int sums_slots(int k) { return kRows > 4 && stages_of(k) >= kSlices ? 2 : 4; }
  // Tiles whose columns are there or on their way: with few stages a tile more of them. Numbers of slots are powers of two.
  __host__ __device__ static constexpr int column_slots(int k) { return stages_of(k) < kSlices ? kMostColumns : 4; }
  __host__ __device__ static constexpr int slices(int k) { return stages_of(k) < kSlices ? stages_of(k) : kSlices; }
  __host__ __device__ static constexpr int entries(int experts) { return kRows > 1 ? experts + 1 : 64; }
  // Without the ring; `k` of one block.
  static constexpr size_t shared_bytes(int k, int experts) {
    return column_slots(k) * column_bytes(k) + sums_slots(k) * slices(k) * kEntries * 8 + quads(k) * 8 * kGroupBytes +
           quads(k) * 8 / kGroups * kOffsetBytes + (quads(k) * kRows * 4 + 15) / 16 * 16 + kBarriers * 8 + sizeof(StreamStart) +
           2 * entries(experts) * sizeof(int);
  }
};

template <typename C>
struct StreamShared {
  char *ring, *columns, *activations, *offsets;
  float2* sums;  // [slots][slices][kEntries]
  float* back;   // [quads][kRows]: undoes the scale of 512 values of a row, times the caller's row scale
  Barrier *full, *free, *columns_full, *columns_free, *sums_ready, *sums_free;
  StreamStart* start;
  int *blocks, *rows;  // few_schedule.cuh

  __device__ StreamShared(char* at, const FewParams& p) {
    auto take = [&at](int bytes) { char* q = at; at += bytes; return q; };
    const int k = p.k, quads = C::quads(k);
    ring = take(p.stages * C::kStageBytes);
    columns = take(C::column_slots(k) * C::column_bytes(k));
    sums = reinterpret_cast<float2*>(take(C::sums_slots(k) * C::slices(k) * C::kEntries * 8));
    activations = take(quads * 8 * C::kGroupBytes);
    offsets = take(quads * 8 / C::kGroups * C::kOffsetBytes);
    back = reinterpret_cast<float*>(take((quads * C::kRows * 4 + 15) / 16 * 16));
    full = reinterpret_cast<Barrier*>(take(C::kBarriers * 8));
    free = full + C::kMostStages, columns_full = free + C::kMostStages, columns_free = columns_full + C::kMostColumns;
    sums_ready = columns_free + C::kMostColumns, sums_free = sums_ready + C::kMostSums;
    start = reinterpret_cast<StreamStart*>(take(sizeof(StreamStart)));
    blocks = reinterpret_cast<int*>(take(4 * C::entries(p.experts)));
    rows = reinterpret_cast<int*>(take(4 * C::entries(p.experts)));
  }
};

// Prefix sums over experts, of blocks of kRows rows and of rows, and this block's range of tiles: of equal weight. All threads,
// which meet in here.
template <typename C>
__device__ void weigh_offsets(const FewParams& p, const StreamShared<C>& s, int* begin, int* end) {
  constexpr int kEach = kMaxExperts / C::kThreads;  // experts side by side are a thread's: their sum goes through the scan
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, each = p.experts > C::kThreads ? kEach : 1;
  const int first = threadIdx.x * each;
  const int before = first > 0 && first <= p.experts ? static_cast<int>(p.offsets[first - 1]) : 0;
  int ends[kEach], count = 0, weight = 0, start = before;
  auto add = [&](int rows, int* count, int* weight) {
    const int full = rows / C::kRows, rest = rows % C::kRows;
    *count += full + (rest > 0), *weight += full * C::kMostWeight + (rest > 0 ? C::weight(rest) : 0);
  };
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    ends[j] = j < each && first + j < p.experts ? static_cast<int>(p.offsets[first + j]) : start;
    add(ends[j] - start, &count, &weight), start = ends[j];
  }
  int counts = count, weights = weight;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, counts, d), others = __shfl_up_sync(~0u, weights, d);
    if (lane >= d) counts += other, weights += others;
  }
  if (lane == 31 && warp < C::kWarps) s.start->of_warp[warp] = counts, s.start->weight_of_warp[warp] = weights;
  if (threadIdx.x == 0) s.blocks[0] = s.rows[0] = 0, s.start->expert = p.experts - 1;
  __syncthreads();
  int blocks = counts - count, all = 0, all_weights = 0;
  weight = weights - weight;
#pragma unroll
  for (int w = 0; w < C::kWarps; ++w) {
    const int of_warp = s.start->of_warp[w], weight_of_warp = s.start->weight_of_warp[w];
    all += of_warp, blocks += w < warp ? of_warp : 0;
    all_weights += weight_of_warp, weight += w < warp ? weight_of_warp : 0;
  }
  const int column_tiles = p.column_tiles.by, grid = gridDim.x, own = blockIdx.x;
  const int64_t total = static_cast<int64_t>(all_weights) * column_tiles;
  const int64_t borders[2] = {own * total / grid, (own + 1) * total / grid};
  if (threadIdx.x == 0) s.start->begin = s.start->end = all * column_tiles;
  __syncthreads();
  start = before;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (j >= each || first + j >= p.experts) break;
    int own_blocks = 0, own_weight = 0;
    add(ends[j] - start, &own_blocks, &own_weight);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int64_t local = borders[b] - static_cast<int64_t>(weight) * column_tiles;
      if (local < 0 || local >= static_cast<int64_t>(own_weight) * column_tiles) continue;
      const int at = static_cast<int>(local), of_block = C::kMostWeight * column_tiles, block = min(at / of_block, own_blocks - 1);
      const int each_tile = C::weight(min(C::kRows, ends[j] - start - block * C::kRows));
      const int tile = (blocks + block) * column_tiles + (at - block * of_block + each_tile - 1) / each_tile;
      if (b == 0) s.start->begin = tile, s.start->expert = first + j;
      else s.start->end = tile;
    }
    blocks += own_blocks, weight += own_weight, start = ends[j];
    s.blocks[first + j + 1] = blocks, s.rows[first + j + 1] = start;
  }
  __syncthreads();
  *begin = uniform(s.start->begin), *end = uniform(s.start->end);
}

// A warp converts blocks of 512 values of a row, a lane 16 of them: block `item` of a warp is (quad, row).
template <typename C>
__device__ void load_items(const FewParams& p, const StreamShared<C>& s, const FewRows& rows, int first, Chunk (&kept)[C::kKept]) {
  int row, count;
  rows.place<C>(p, s, &row, &count);
#pragma unroll
  for (int i = 0; i < C::kKept; ++i) {
    const int item = first + i * C::kWarps, c = item / C::kRows * 32 + threadIdx.x % 32;
    const int chunks = p.k / 16;
    kept[i] = Chunk{};
    if (c < chunks) kept[i].load(row_in(p, row, count, item % C::kRows), c);
  }
}

// The consumer warps together: activations of a block of rows become digits in shared memory. `kept`: each warp's first items.
template <typename C>
__device__ void convert_rows(const FewParams& p, const StreamShared<C>& s, const FewRows& rows, int warp, Chunk (&kept)[C::kKept]) {
  constexpr int R = C::kRows;
  const int lane = threadIdx.x % 32, items = C::quads(p.k) * R;
  int first_row, count;
  rows.place<C>(p, s, &first_row, &count);
#pragma unroll 1
  for (int first = warp; first < items; first += C::kKept * C::kWarps) {
    if (first != warp) load_items<C>(p, s, rows, first, kept);
#pragma unroll
    for (int i = 0; i < C::kKept; ++i) {
      const int item = first + i * C::kWarps, quad = item / R, row = item % R;
      if (item >= items) break;
      const IntegerScale own(__reduce_max_sync(~0u, kept[i].largest(p.dtype)));
      if (lane == 0)
        s.back[item] = p.row_scale && count > 0 ? own.back * p.row_scale[first_row + min(row, count - 1)] : own.back;
      if (p.fastdeploy) kept[i].arrange();
      const Digits digits(kept[i], p.dtype, own.scale);
      const int group = quad * 8 + lane / 4, t = lane % 4, slot = group % C::kGroups;
      int offset[2];
#pragma unroll
      for (int d = 0; d < 2; ++d) {
        offset[d] = quad_sum(digits.offset[d]);
        const int column = slot * 2 * R + 2 * row + d;
        *reinterpret_cast<uint4*>(s.activations + group * C::kGroupBytes + column / 8 * 512 + column % 8 * 64 + t * 16) =
            digits.bytes[d];
      }
      if (t == 0)
        *reinterpret_cast<int4*>(s.offsets + group / C::kGroups * C::kOffsetBytes + (slot * R + row) * 16) =
            make_int4(offset[0], offset[1], offset[0], offset[1]);
    }
  }
}

// A stage's part of the sums, of columns g and g + 8: `out`, for row t of each block of four (or t % kRows); kNT: blocks that the
// tile really has. All that is read of shared memory is asked for a group ahead.
template <typename C, int kNT>
__device__ void multiply_stage(const char* codes, const char* scales, const char* x, const char* offsets, const float* back,
                               const Column<C::kPairs> (&column)[2], Barrier* free, uint32_t four,
                               float2 (&out)[C::kNT]) {
  constexpr int kGroups = C::kGroups, kAll = 2 * C::kUnits;
  const int t = threadIdx.x % 4;
  const int shift = kGroups == 4 ? t % 2 * 4 : kGroups == 2 ? t / 2 * 4 : 0;
  int o[kNT][4] = {}, d[2][kNT][4];
  uint32_t f[2] = {}, nibbles[2] = {}, next_nibbles[2] = {};  // of columns g and g + 8
  uint4 q{}, next_q{};
  auto begin = [&](int set, int group) {
#pragma unroll
    for (int j = 0; j < kNT; ++j) {
      const int4 c = *reinterpret_cast<const int4*>(offsets + group / kGroups * C::kOffsetBytes + j * 64);
      d[set][j][0] = c.x, d[set][j][1] = c.y, d[set][j][2] = c.z, d[set][j][3] = c.w;
    }
  };
  auto load = [&](int u) {
    next_q = *reinterpret_cast<const uint4*>(codes + u * C::kUnitBytes);
    if (kGroups < 4 || u % 2 == 0)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        next_nibbles[i] = *reinterpret_cast<const uint8_t*>(scales + (kGroups == 4 ? u + t / 2 : u) * C::kUnitScales + i);
  };
  auto scaled = [&](int set) {
#pragma unroll
    for (int j = 0; j < kNT; ++j) {
      o[j][0] += f[0] * d[set][j][0], o[j][1] += f[0] * d[set][j][1];
      o[j][2] += f[1] * d[set][j][2], o[j][3] += f[1] * d[set][j][3];
    }
  };
  load(0);
  begin(0, 0);
#pragma unroll
  for (int group = 0; group < kAll; ++group) {
    const int u = group / 2, half = group % 2, set = group / kGroups % 2;
    const bool first = group % kGroups == 0;
    if (half == 0) {
      q = next_q, nibbles[0] = next_nibbles[0], nibbles[1] = next_nibbles[1];
      asm("" : "+r"(nibbles[0]), "+r"(nibbles[1]));  // else the compiler, which knows that they are bytes, masks and shifts
    }
    const uint32_t low = half ? q.z : q.x, high = half ? q.w : q.y;
    uint32_t steps[2][4];
    {
      const ByteWindows v(column[0].template codes<0>(low), four), w(column[1].template codes<0>(high), four);
      steps[0][0] = v.even, steps[0][1] = w.even, steps[0][2] = v.odd, steps[0][3] = w.odd;
    }
    {
      const ByteWindows v(column[0].template codes<1>(low), four), w(column[1].template codes<1>(high), four);
      steps[1][0] = v.even, steps[1][1] = w.even, steps[1][2] = v.odd, steps[1][3] = w.odd;
    }
#pragma unroll
    for (int j = 0; j < kNT; ++j) {
      const uint4 v = *reinterpret_cast<const uint4*>(x + group * C::kGroupBytes + j * 512);
      mma_bytes(d[set][j], steps[0][0], steps[0][1], steps[0][2], steps[0][3], v.x, v.y);
      mma_bytes(d[set][j], steps[1][0], steps[1][1], steps[1][2], steps[1][3], v.z, v.w);
    }
    if (half == 0 && u + 1 < C::kUnits) {
      load(u + 1);
      if (u + 2 == C::kUnits) free->arrive_together();  // every lane has what it needs of the stage
    }
    if (first && group > 0) scaled(set ^ 1);
    if (first && group + kGroups < kAll) begin(set ^ 1, group + kGroups);
    if (group % kGroups == kGroups - 1)
#pragma unroll
      for (int i = 0; i < 2; ++i) f[i] = kGroups > 1 ? nibbles[i] >> shift & 15 : half ? nibbles[i] >> 4 : nibbles[i] & 15;
  }
  scaled((kAll - 1) / kGroups % 2);
#pragma unroll
  for (int j = 0; j < kNT; ++j) {
    const float scale = back[4 * j];
    out[j].x = fmaf(fmaf(static_cast<float>(o[j][0]), 256.f, static_cast<float>(o[j][1])), scale, out[j].x);
    out[j].y = fmaf(fmaf(static_cast<float>(o[j][2]), 256.f, static_cast<float>(o[j][3])), scale, out[j].y);
  }
}

// The warps that request: columns and scales of a tile, then its stages, each warp every kProducers-th.
template <typename C>
__device__ void request_stages(const FewParams& p, const StreamShared<C>& s, int begin, int end, int expert, int own) {
  const int lane = threadIdx.x % 32, blocks_k = p.k / 128, tiles_n = p.n / 16;
  const int column_tiles = p.column_tiles.by, slots = C::column_slots(p.k), bytes = C::column_bytes(p.k);
  int block = p.column_tiles.divide(begin), column = begin - block * column_tiles, stage = 0, turn = 0;
  uint32_t parity = 1;  // of the round before: passed at once in the first
  const uint64_t policy = streaming_policy();
  for (int tile = begin; tile < end; ++tile) {
    const int i = tile - begin, slot = (i & (slots - 1)), t16 = column * C::kTiles, tiles = min(C::kTiles, tiles_n - t16);
    size_t unit = ccq_unit_index(expert, t16, 0, tiles_n, blocks_k);
    if (own == 0) {
      s.columns_free[slot].wait((i & slots) == 0);
      if (lane == 0) {
        Barrier* const full = s.columns_full + slot;
        char* const to = s.columns + slot * bytes;
        full->arrive_and_expect(tiles * kPlaneBytes * C::kPlanes + blocks_k * tiles * 16);
        const uint32_t* const from = p.columns + (static_cast<size_t>(expert) * tiles_n + t16) * 32;
        const size_t plane = static_cast<size_t>(p.experts) * tiles_n * 32;
#pragma unroll
        for (int j = 0; j < C::kPlanes; ++j)
          bulk_copy(to + j * (C::kTiles * kPlaneBytes), from + j * plane, tiles * kPlaneBytes, full);
        if (tiles == C::kTiles) {
          bulk_copy(to + C::kColumnBytes, p.scales + unit * 16, blocks_k * C::kUnitScales, full, policy);
        } else {
          for (int u = 0; u < blocks_k; ++u)
            bulk_copy(to + C::kColumnBytes + u * C::kUnitScales, p.scales + (unit + u * tiles) * 16, tiles * 16, full, policy);
        }
      }
      __syncwarp();
    }
    for (int kb = 0; kb < blocks_k; kb += C::kUnits) {
      const int units = min(C::kUnits, blocks_k - kb) * tiles;
      if (turn == own) {
        s.free[stage].wait(parity);
        if (lane == 0) {
          Barrier* const full = s.full + stage;
          char* const to = s.ring + stage * C::kStageBytes;
          full->arrive_and_expect(units * 512);
          if (tiles == C::kTiles) {
            bulk_copy(to, p.quant + unit * 512, units * 512, full, policy);
          } else {
            for (int u = 0; u * tiles < units; ++u)
              bulk_copy(to + u * C::kUnitBytes, p.quant + (unit + u * tiles) * 512, tiles * 512, full, policy);
          }
        }
        __syncwarp();
      }
      unit += units;
      if (++turn == C::kProducers) turn = 0;
      if (++stage == p.stages) stage = 0, parity ^= 1;
    }
    if (++column == column_tiles) {
      column = 0, ++block;
      if (tile + 1 < end) expert = min(expert_of<C>(s, block, expert), p.experts - 1);
    }
  }
}

// The warp that writes: a tile's sums, in the order of K. A lane has columns g and g + 8 of one 16-column tile.
template <typename C>
__device__ void write_tiles(const FewParams& p, const StreamShared<C>& s, int begin, int end, FewRows rows) {
  const int k = p.k, tiles_n = p.n / 16, column_tiles = p.column_tiles.by;
  const int slots = C::sums_slots(k), slices = C::slices(k), lane = threadIdx.x % 32;
  const int column_slots = C::column_slots(k);
  int column = begin - rows.block * column_tiles, row, count;
  rows.place<C>(p, s, &row, &count);
  for (int tile = begin; tile < end; ++tile) {
    const int i = tile - begin, slot = (i & (slots - 1)), columns_slot = (i & (column_slots - 1)), t16 = column * C::kTiles + lane / 8;
    const float2* const from = s.sums + slot * slices * C::kEntries;
    s.columns_full[columns_slot].wait((i & column_slots) != 0);
    const float2 super = load_supers(s.columns + columns_slot * C::column_bytes(k) + lane / 8 * kPlaneBytes, lane % 8);
    s.sums_ready[slot].wait((i & slots) != 0);
#pragma unroll 2
    for (int r = 0; r < count; ++r) {
      float2 sum = from[r * C::kRowEntries + lane];
      for (int w = 1; w < slices; ++w) {
        const float2 v = from[w * C::kEntries + r * C::kRowEntries + lane];
        sum.x += v.x, sum.y += v.y;
      }
      if (t16 >= tiles_n) continue;
      const size_t to = static_cast<size_t>(row + r) * p.n + t16 * 16 + lane % 8;
      store(p.out, p.dtype, to, sum.x * super.x);
      store(p.out, p.dtype, to + 8, sum.y * super.y);
    }
    s.sums_free[slot].arrive_together();
    s.columns_free[columns_slot].arrive_together();
    if (++column == column_tiles && tile + 1 < end) {
      column = 0, ++rows.block;
      rows.expert = expert_of<C>(s, rows.block, rows.expert);
      rows.place<C>(p, s, &row, &count);
    }
  }
}

template <int kBlocks>
struct Blocks {
  static constexpr int value = kBlocks;
};

// The warps that multiply.
template <typename C>
__device__ void multiply_tiles(const FewParams& p, const StreamShared<C>& s, int begin, int end, FewRows rows, int warp,
                               Chunk (&kept)[C::kKept]) {
  constexpr int R = C::kRows, kPartBytes = 2 * C::kUnits * C::kGroupBytes, kPartOffsets = 2 * C::kUnits / C::kGroups * C::kOffsetBytes;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, wk = warp / 4, wn = warp % 4;
  const int k = p.k, column_tiles = p.column_tiles.by, stages_k = C::stages_of(k);
  const int slots = C::sums_slots(k), slices = C::slices(k), column_slots = C::column_slots(k);
  uint32_t four = 4;
  asm volatile("" : "+r"(four));
  int tile = begin, part = wk, stage = wk;
  uint32_t parity = 0;
  while (part >= stages_k) part -= stages_k, ++tile;
  for (int block = rows.block; ; ++block) {
    const int block_end = min(end, (block + 1) * column_tiles);
    if (block > rows.block) {
      rows = FewRows{uniform(expert_of<C>(s, block, rows.expert)), block};
      load_items<C>(p, s, rows, warp, kept);
      named_barrier<1, C::kThreads>();  // the activations there are no longer read
    }
    convert_rows<C>(p, s, rows, warp, kept);
    named_barrier<1, C::kThreads>();
    int row, count;
    rows.place<C>(p, s, &row, &count);
    count = uniform(count);
    while (tile < block_end) {
      // A warp right of the last column multiplies what lies there and writes nothing.
      const int i = tile - begin, columns_slot = (i & (column_slots - 1)), slice = part;
      Column<C::kPairs> column[2];
      const char* const at_columns = s.columns + columns_slot * C::column_bytes(k);
      const char* const columns = at_columns + wn * kPlaneBytes;
      s.columns_full[columns_slot].wait((i & column_slots) != 0);
      load_columns<C::kPairs>(columns, columns + C::kTiles * kPlaneBytes, g, column);
      float2 out[C::kNT] = {};
      const char* x = s.activations + part * kPartBytes + lane * 16;
      const char* offsets = s.offsets + part * kPartOffsets + t * 16;
      const float* back = s.back + part * C::kUnits / 4 * R + t % (R < 4 ? R : 4);
      const char* scales = at_columns + C::kColumnBytes + part * C::kUnits * C::kUnitScales + wn * 16 + g * 2;
      auto multiply = [&](auto blocks) {
#pragma unroll 1
        for (; part < stages_k; part += C::kSlices) {
          const char* const at = s.ring + stage * C::kStageBytes;
          s.full[stage].wait(parity);
          multiply_stage<C, decltype(blocks)::value>(at + wn * 512 + lane * 16, scales, x, offsets, back, column,
                                                     s.free + stage, four, out);
          x += C::kSlices * kPartBytes, offsets += C::kSlices * kPartOffsets, back += C::kSlices * C::kUnits / 4 * R;
          scales += C::kSlices * C::kUnits * C::kUnitScales;
          if ((stage += C::kSlices) >= p.stages) stage -= p.stages, parity ^= 1;
        }
      };
      if constexpr (C::kNT == 2) {
        if (count <= 4) multiply(Blocks<1>{});
        else multiply(Blocks<2>{});
      } else {
        multiply(Blocks<1>{});
      }
      const int slot = (i & (slots - 1));
      s.sums_free[slot].wait((i & slots) == 0);
      float2* const to = s.sums + (slot * slices + slice) * C::kEntries + wn * 8 + g;
#pragma unroll
      for (int j = 0; j < C::kNT; ++j) {
        // Lanes t and t ^ 2 have the same row, with one row all four lanes of a quad.
        if (R < 4) out[j].x += __shfl_xor_sync(~0u, out[j].x, 2), out[j].y += __shfl_xor_sync(~0u, out[j].y, 2);
        if (R < 2) out[j].x += __shfl_xor_sync(~0u, out[j].x, 1), out[j].y += __shfl_xor_sync(~0u, out[j].y, 1);
        if (4 * j + t < count) to[(4 * j + t) * C::kRowEntries] = out[j];
      }
      s.sums_ready[slot].arrive_together();
      s.columns_free[columns_slot].arrive_together();
      for (part -= stages_k, ++tile; part >= stages_k; part -= stages_k) ++tile;
    }
    if (block_end == end) break;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kAllThreads, 1) stream_kernel(const FewParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // empty for other GPUs, which never run it
  dependents_may_start();
  extern __shared__ __align__(128) char shared[];
  const StreamShared<C> s(shared, p);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, k = p.k;
  if (lane == 0) {  // of each warp, for the lanes of one would do it one after another
#pragma unroll
    for (int i = warp; i < C::kMostStages; i += C::kWarps) s.full[i].init(1), s.free[i].init(4 * kWarpArrivals);
    const int warps = 4 * C::slices(k);
    if (warp < C::kMostColumns) s.columns_full[warp].init(1), s.columns_free[warp].init((warps + 1) * kWarpArrivals);
    if (warp < C::kMostSums) {
      s.sums_ready[warp].init(warps * kWarpArrivals), s.sums_free[warp].init(kWarpArrivals);
    }
    publish_barriers();
  }
  if (C::kGroups > 1)  // columns of a group that hold other groups are zero, and stay so
    for (int i = threadIdx.x * 16; i < C::quads(k) * 8 * C::kGroupBytes; i += C::kAllThreads * 16)
      *reinterpret_cast<uint4*>(s.activations + i) = uint4{};
  // Whether the host knows the block's range of tiles: always, but with several matrices and rows a block.
  const bool known = C::kRows == 1 || !p.offsets;
  const int own = blockIdx.x;
  int begin = own * p.each + min(own, p.longer);
  int end = begin + p.each + (own < p.longer), first_block = p.column_tiles.divide(begin);
  if (p.offsets && static_cast<int>(threadIdx.x) * 16 < p.experts) prefetch_line(p.offsets + threadIdx.x * 16);
  wait_for_prerequisites();  // before any read: an earlier kernel may have written anything, weights included
  if (!known) {
    weigh_offsets<C>(p, s, &begin, &end);
    first_block = p.column_tiles.divide(begin);
  }
  if (begin == end) return;
  FewRows rows{uniform(known ? 0 : expert_of<C>(s, first_block, s.start->expert)), first_block};
  Chunk kept[C::kKept];
  if (warp < C::kWarps) load_items<C>(p, s, rows, warp, kept);
  if (C::kRows == 1 && p.offsets) find_experts<C>(p, s, first_block, p.column_tiles.divide(end - 1));
  else if (!p.offsets && warp == 0) one_expert<C>(p, s, first_block, end);
  // Barriers stand, and no weights are requested before all activations are: those would wait behind them.
  __syncthreads();
  if (C::kRows == 1) rows.expert = uniform(expert_of<C>(s, first_block, 0));
  if (warp >= C::kWarps) {
    deallocate_registers<C::kOtherRegisters>();
    if (warp < C::kWriter) request_stages<C>(p, s, begin, end, min(rows.expert, p.experts - 1), warp - C::kProducer);
    else if (warp == C::kWriter) write_tiles<C>(p, s, begin, end, rows);
  } else {
    allocate_registers<C::kConsumerRegisters>();
    multiply_tiles<C>(p, s, begin, end, rows, warp, kept);
  }
#endif
}

}  // namespace ccq
