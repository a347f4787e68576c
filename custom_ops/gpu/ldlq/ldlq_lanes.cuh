// SPDX-License-Identifier: Apache-2.0
// Which lane holds what: choice of pairs, lists of lanes by pair, and copies between channels and lanes.
//
// Blocks of the search work on lanes of one pair, so lanes are sorted by pair; within a pair in the order of the
// channels. All of it stays on the device: the host need not wait to know how many lanes a pair got.
#pragma once

#include "ldlq_group.cuh"

namespace ccq_ldlq {

constexpr int kListThreads = 256;

struct Lanes {
  int* begin;    // [pairs + 1]
  int* channel;  // of every lane
  int* pair;
  float* super;
};

// Every pair for `count` channels from `first` on, with the first super scale.
__global__ void list_all(Lanes lanes, int pairs, int count, int first, const float* supers) {
  const int lane = blockIdx.x * blockDim.x + threadIdx.x;
  if (lane <= pairs) lanes.begin[lane] = lane * count;
  if (lane >= pairs * count) return;
  lanes.pair[lane] = lane / count;
  lanes.channel[lane] = first + lane % count;
  lanes.super[lane] = supers[first + lane % count];
}

// kept [n, keep]: the pairs of each channel with the least losses, of equal ones the first; in ascending order.
// loss of pair p and channel i at p * count + i. picked: bytes [count, pairs].
__global__ void keep_pairs(const double* loss, int count, int pairs, int keep, int first, uint8_t* picked, int* kept) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  uint8_t* mine = picked + static_cast<int64_t>(i) * pairs;
  for (int p = 0; p < pairs; ++p) mine[p] = 0;
  for (int rank = 0; rank < keep; ++rank) {
    int best = -1;
    for (int p = 0; p < pairs; ++p)
      if (!mine[p] && (best < 0 || loss[static_cast<int64_t>(p) * count + i] < loss[static_cast<int64_t>(best) * count + i]))
        best = p;
    mine[best] = 1;
  }
  int* out = kept + static_cast<int64_t>(first + i) * keep;
  for (int p = 0; p < pairs; ++p)
    if (mine[p]) *out++ = p;
}

// The same where all pairs are kept.
__global__ void keep_all(int n, int pairs, int* kept) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n * pairs) kept[i] = i % pairs;
}

// Where pair p stands among a channel's kept ones, or -1.
__device__ inline int slot_of(const int* kept, int keep, int p) {
  for (int q = 0; q < keep; ++q)
    if (kept[q] == p) return q;
  return -1;
}

// One block a pair: how many of the channels keep it.
__global__ void count_lanes(const int* kept, int keep, int first, int count, int* counts) {
  __shared__ int partial[kListThreads];
  int mine = 0;
  for (int i = threadIdx.x; i < count; i += kListThreads)
    mine += slot_of(kept + static_cast<int64_t>(first + i) * keep, keep, blockIdx.x) >= 0;
  partial[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int t = 1; t < kListThreads; ++t) mine += partial[t];
  counts[blockIdx.x] = mine;
}

// One block a pair. A pair's lanes: all its channels with the first super scale, all with the second, ...
// place [n, keep]: a channel's position in the list of each of its pairs. supers: [candidates, super_stride].
__global__ void list_kept(Lanes lanes, const int* counts, int pairs, const int* kept, int keep, int first, int count,
                          const float* supers, int64_t super_stride, int candidates, int* place) {
  __shared__ int partial[kListThreads];
  const int p = blockIdx.x, each = (count + kListThreads - 1) / kListThreads;
  const int from = min(static_cast<int>(threadIdx.x) * each, count), to = min(from + each, count);
  int mine = 0;
  for (int i = from; i < to; ++i) mine += slot_of(kept + static_cast<int64_t>(first + i) * keep, keep, p) >= 0;
  partial[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int t = 0, sum = 0; t < kListThreads; ++t) {
      const int own = partial[t];
      partial[t] = sum;
      sum += own;
    }
  __syncthreads();
  int base = 0;
  for (int q = 0; q < p; ++q) base += counts[q];
  base *= candidates;
  const int size = counts[p];
  if (threadIdx.x == 0) {
    lanes.begin[p] = base;
    if (p == pairs - 1) lanes.begin[pairs] = base + candidates * size;
  }
  int at = partial[threadIdx.x];
  for (int i = from; i < to; ++i) {
    const int64_t channel = first + i;
    const int slot = slot_of(kept + channel * keep, keep, p);
    if (slot < 0) continue;
    place[channel * keep + slot] = at;
    for (int s = 0; s < candidates; ++s) {
      const int lane = base + s * size + at;
      lanes.channel[lane] = static_cast<int>(channel);
      lanes.pair[lane] = p;
      lanes.super[lane] = supers[s * super_stride + channel];
    }
    ++at;
  }
}

// blocks [capacity]: each pair's lanes in pieces of `size`; the rest empty.
__global__ void cut_blocks(const int* begin, int pairs, int size, BlockLanes* blocks, int capacity) {
  for (int i = threadIdx.x; i < capacity; i += blockDim.x) blocks[i] = BlockLanes{0, 0, 0, 0};
  __syncthreads();
  for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
    int block = 0;
    for (int q = 0; q < p; ++q) block += (begin[q + 1] - begin[q] + size - 1) / size;
    for (int lane = begin[p]; lane < begin[p + 1]; lane += size, ++block)
      blocks[block] = BlockLanes{p, lane, min(size, begin[p + 1] - lane), 0};
  }
}

// Results by channel.
struct Best {
  int64_t stride;
  uint8_t* words;  // [k/4, stride]
  uint8_t* local;  // [k/64, stride]
  float* super;
  int* pair;
  double* loss;
  int* lane;       // which lane won
};

// The best run of each channel: over its pairs in ascending order, for each the best of its super scales, always the
// first among equals (a loss that is no number stays, as on the CPU, where it came first).
__global__ void choose(Lanes lanes, const double* loss, const int* kept, int keep, const int* place, int first, int count,
                       int candidates, Best best) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t channel = first + i;
  double least = -1;
  int winner = 0;
  for (int q = 0; q < keep; ++q) {
    const int p = kept[channel * keep + q], base = lanes.begin[p], size = (lanes.begin[p + 1] - base) / candidates;
    double mine = -1;
    int lane = 0;
    for (int s = 0; s < candidates; ++s) {
      const int at = base + s * size + place[channel * keep + q];
      if (mine < 0 || loss[at] < mine) mine = loss[at], lane = at;
    }
    if (least < 0 || mine < least) least = mine, winner = lane;
  }
  best.loss[channel] = least;
  best.lane[channel] = winner;
  best.pair[channel] = lanes.pair[winner];
  best.super[channel] = lanes.super[winner];
}

// Words and local scales of the chosen lanes. Grid: channels, rows of words.
__global__ void take_choice(const uint8_t* words, const uint8_t* local, int64_t stride, int first, int count, Best best) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t channel = first + i, row = blockIdx.y, lane = best.lane[channel];
  best.words[row * best.stride + channel] = words[row * stride + lane];
  if (row % kBlocks == 0)
    best.local[row / kBlocks * best.stride + channel] = local[row / kBlocks * stride + lane];
}

// x = w of every lane's channel. Grid: lanes, k / 4.
__global__ void load_weights(const float* weight, int64_t weight_stride, const int* channel, int lanes, float* x,
                             int64_t stride) {
  const int lane = blockIdx.x * blockDim.x + threadIdx.x;
  if (lane >= lanes) return;
  const float* from = weight + channel[lane];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    const int64_t row = static_cast<int64_t>(blockIdx.y) * kBlock + i;
    x[row * stride + lane] = from[row * weight_stride];
  }
}

// A channel's words and local scales into its lane, or (back) out of it. Grid: lanes, k / 4.
template <bool kBack>
__global__ void move_choice(Best best, const int* channel, int lanes, uint8_t* words, uint8_t* local, int64_t stride) {
  const int lane = blockIdx.x * blockDim.x + threadIdx.x;
  if (lane >= lanes) return;
  const int64_t row = blockIdx.y, from = row * best.stride + channel[lane], to = row * stride + lane;
  kBack ? best.words[from] = words[to] : words[to] = best.words[from];
  if (row % kBlocks) return;
  const int64_t group = row / kBlocks, there = group * best.stride + channel[lane], here = group * stride + lane;
  kBack ? best.local[there] = local[here] : local[here] = best.local[there];
}

__global__ void return_results(Best best, const int* channel, int lanes, const float* super, const double* loss) {
  const int lane = blockIdx.x * blockDim.x + threadIdx.x;
  if (lane >= lanes) return;
  best.super[channel[lane]] = super[lane];
  best.loss[channel[lane]] = loss[lane];
}

// out[c, r] = in[r, c]. Blocks of 32 x 8 threads.
template <typename From, typename To>
__global__ void transpose(const From* in, int64_t rows, int64_t columns, int64_t in_stride, To* out, int64_t out_stride) {
  __shared__ To tile[32][33];
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * 32, row0 = static_cast<int64_t>(blockIdx.y) * 32;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  for (int i = y; i < 32; i += 8)
    if (row0 + i < rows && column0 + x < columns) tile[i][x] = static_cast<To>(in[(row0 + i) * in_stride + column0 + x]);
  __syncthreads();
  for (int i = y; i < 32; i += 8)
    if (column0 + i < columns && row0 + x < rows) out[(column0 + i) * out_stride + row0 + x] = tile[x][i];
}

}  // namespace ccq_ldlq
