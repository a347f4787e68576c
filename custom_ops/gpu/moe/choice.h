// SPDX-License-Identifier: Apache-2.0
// Which kernel serves a call of the grouped GEMM: candidates, those that are possible, the least cost. Host code alone, so that it
// can be tried without a GPU.
//
// Kernels have numbers: from 0 moe_gemm.cuh, from kWide moe_wide.cuh, from kFew moe_few.cuh, from kStreamFew few_stream.cuh,
// from kSome some_stream.cuh, from kHalves moe_wide.cuh with activations in fp16.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cmath>

namespace ccq {

// Rows an expert on average from which kernels are chosen that have large tiles, and so large partial results (gemm_launch.cuh).
constexpr int kManyRows = 8;
constexpr int kWide = 10, kFew = 20, kStreamFew = 30, kSome = 50, kHalves = 60;

struct Gpu {
  int sms, major, shared;  // shared: bytes of shared memory that a block may have
};
struct Call {
  int rows, k, n, experts;
  double mean() const { return static_cast<double>(rows) / experts; }
  int pairs() const { return k / 256; }  // of units of 128 input rows
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A configuration of moe_wide.cuh: its tile, and what a multiprocessor needs for a unit (128 input rows) of a tile that multiplies
// all its rows, or half of them, for a tile besides its units, and for a launch. Microseconds, fitted to measurements on an H200
// (seven and eight shapes, 32 to 4096 tokens, bfloat16, integer pairs), which they meet within 1 to 8 % in the mean; tiles of 256 rows to
// 1024 to 8192 tokens, beside those of 144 rows.
struct WideCost {
  int variant, columns, rows;
  double unit, half_unit, tile, start;
};
constexpr WideCost kWideCosts[] = {
    {kWide, 512, 32, 1.590, 1.346, 0.72, 11.9},     {kWide + 1, 512, 48, 1.832, 1.440, 0.86, 12.1},
    {kWide + 2, 512, 64, 2.029, 1.583, 1.34, 15.4}, {kWide + 3, 256, 96, 1.363, 1.108, 0.92, 7.5},
    {kWide + 4, 256, 128, 1.633, 1.083, 2.34, 8.0},  {kWide + 5, 256, 144, 1.613, 1.613, 3.16, 8.0},
    {kWide + 6, 128, 256, 1.344, 0.812, 2.79, 8.0},
};
// With activations in fp16, which a kernel before prepares.
constexpr WideCost kHalvesCosts[] = {
    {kHalves, 512, 32, 1.434, 1.050, 1.29, 13.2}, {kHalves + 1, 512, 48, 1.750, 1.250, 1.84, 15.3},
};

// Tiles that an expert is expected to have. Its rows are taken to be spread as random routing spreads them: by the square root of
// their mean.
struct Tiles {
  double whole = 0, half = 0;
};
inline Tiles expected_tiles(const Call& call, int tile_rows) {
  Tiles found;
  auto add = [&](int rows, double share) {
    const int rest = rows % tile_rows;
    found.whole += share * (rows / tile_rows + (rest > tile_rows / 2));
    found.half += share * (rest > 0 && rest <= tile_rows / 2);
  };
  if (call.experts == 1) {
    add(call.rows, 1);
    return found;
  }
  const double mean = call.mean(), spread = std::max(std::sqrt(mean), 1e-3);
  const int from = std::max(0, static_cast<int>(mean - 4 * spread)), to = static_cast<int>(mean + 4 * spread) + 1;
  double all = 0;
  auto weight = [&](int rows) { return std::exp(-0.5 * (rows - mean) * (rows - mean) / (spread * spread)); };
  for (int rows = from; rows <= to; ++rows) all += weight(rows);
  for (int rows = from; rows <= to; ++rows) add(rows, weight(rows) / all);
  return found;
}

// Microseconds, about.
inline double wide_cost(const Gpu& gpu, const Call& call, const WideCost& c) {
  const Tiles tiles = expected_tiles(call, c.rows);
  const int columns = ceil_div(call.n, c.columns), units = call.k / 128;
  const double work = (tiles.whole * (c.unit * units + c.tile) + tiles.half * (c.half_unit * units + c.tile)) * call.experts;
  const double waves = (tiles.whole + tiles.half) * call.experts * columns / gpu.sms;
  // Fewer tiles than multiprocessors are cut along K, into eight at most (waves.cuh).
  return c.start + work * columns / gpu.sms * std::max(1.0, 1 / std::min(1.0, 8 * waves));
}

template <typename F>
int wide_choice(const Gpu& gpu, const Call& call, F&& fits) {
  int best = -1;
  double least = 0;
  for (const WideCost& c : kWideCosts) {
    const double cost = wide_cost(gpu, call, c);
    if (fits(c.variant) && (best < 0 || cost < least)) best = c.variant, least = cost;
  }
  return best;
}

// A configuration of moe_few.cuh: rows a tile; 16-column tiles a warp, warps along K and along N.
struct Few {
  int variant, rows, tiles, warps_k, warps_n;
  int columns() const { return 16 * tiles * warps_n; }
};
constexpr Few kFews[] = {
    {kFew, 1, 1, 16, 1},     {kFew + 1, 1, 2, 16, 1}, {kFew + 2, 1, 4, 16, 1}, {kFew + 3, 1, 4, 4, 4}, {kFew + 4, 1, 4, 2, 8},
    {kFew + 5, 2, 4, 16, 1}, {kFew + 6, 2, 4, 8, 2},  {kFew + 7, 4, 1, 16, 1}, {kFew + 8, 4, 2, 16, 1}, {kFew + 9, 4, 4, 16, 1},
};

// What it must not do: leave multiprocessors idle, or warps without work along K. Borders measured on an H100.
inline bool few_suits(const Gpu& gpu, const Call& call, const Few& c) {
  const int enough = gpu.sms * 3 / 4, pairs = call.pairs();
  const int blocks = call.experts == 1 ? ceil_div(call.rows, c.rows) : std::min(call.rows, call.experts);
  auto tiles = [&](int columns) { return blocks * ceil_div(call.n, columns); };
  // The widest tile of which there is about one for every multiprocessor.
  const int width = tiles(64) >= enough ? 4 : tiles(32) >= enough ? 2 : 1;
  if (c.rows == 2) {
    if (width != 4) return false;
    return (c.variant == kFew + 5) == (pairs >= 8);
  }
  if (c.tiles != width) return false;
  // Two projections that run different kernels of four rows push each other out of the instruction cache: one for both.
  if (c.rows == 4) return width > 1 || tiles(16) >= enough;
  if (width < 4) return true;
  const bool long_k = pairs >= 16 || tiles(256) < enough, middle = pairs >= 4 || tiles(512) < enough;
  return c.variant == (long_k ? kFew + 2 : middle ? kFew + 3 : kFew + 4);
}

// Up to four rows an expert. -1: another kernel.
template <typename F>
int few_choice(const Gpu& gpu, const Call& call, F&& fits) {
  const int pairs = call.pairs();
  const double mean = call.mean();
  const bool small = static_cast<int64_t>(call.k) * call.n <= 1 << 23;  // such a matrix is not worth two launches
  if (call.experts == 1 ? call.rows > (small ? 16 : 8) : mean > (pairs < 4 ? 0.6 : 2.4)) return -1;
  const int rows = call.experts == 1 ? (call.rows > 2 ? 4 : call.rows)
                   : mean <= (pairs < 4 ? 0.6 : 0.3) ? 1 : mean <= 0.75 ? 2 : 4;
  for (int tile_rows : {rows, 1})
    for (const Few& c : kFews)
      if (c.rows == tile_rows && few_suits(gpu, call, c) && fits(c.variant)) return c.variant;
  return -1;
}

// A configuration of few_stream.cuh: rows a tile (of 64 columns), and the microseconds that a launch, a stage (512 input rows of a
// tile) and a tile besides its stages take. Fitted, with the next table, to one run on an H200 (seven shapes, 4 to 128 tokens, bfloat16,
// integer pairs), which they meet within 2 to 5 % in the mean, with eight rows within 12 %; then moved by up to 12 %, so that the
// fastest of the kernels of that run cost the least: what is chosen there took 0.3 % longer in the mean, 4 % at most.
struct StreamCost {
  int variant, rows;
  double start, stage, tile;
};
constexpr StreamCost kStreamCosts[] = {
    {kStreamFew, 1, 4.21, 0.266, 0.199},
    {kStreamFew + 1, 2, 7.92, 0.284, 0.111},
    {kStreamFew + 2, 4, 7.42, 0.285, 0.229},
    {kStreamFew + 3, 8, 11.20, 0.349, 0.166},
};

// use(rows, share) for each number of rows that an expert may have, if rows come from tokens that choose eight experts each; `share` of
// the experts.
template <typename F>
void for_rows(const Call& call, F&& use) {
  const int tokens = ceil_div(call.rows, 8);
  const double chosen = call.mean() / tokens;
  if (call.experts == 1 || chosen >= 1) return use(ceil_div(call.rows, call.experts), 1.0);
  const double odds = chosen / (1 - chosen), spread = 5 * std::sqrt(call.mean()) + 2;
  const int from = std::max(0, static_cast<int>(call.mean() - spread)), to = std::min(tokens, static_cast<int>(call.mean() + spread));
  const int middle = static_cast<int>(call.mean());
  auto more = [&](int rows) { return odds * (tokens - rows) / (rows + 1); };  // experts with a row more, for one with `rows`
  auto walk = [&](auto&& each) {
    double share = 1;
    for (int rows = middle; rows <= to; share *= more(rows), ++rows) each(rows, share);
    share = 1;
    for (int rows = middle - 1; rows >= from; --rows) share /= more(rows), each(rows, share);
  };
  double all = 0;
  walk([&](int, double share) { all += share; });
  walk([&](int rows, double share) { use(rows, share / all); });
}
// Blocks of at most `block_rows` rows that the experts are expected to have.
inline double expected_blocks(const Call& call, int block_rows) {
  double blocks = 0;
  for_rows(call, [&](int rows, double share) { blocks += share * ceil_div(rows, block_rows); });
  return blocks * call.experts;
}

inline double stream_cost(const Gpu& gpu, const Call& call, const StreamCost& c) {
  return c.start + expected_blocks(call, c.rows) * ceil_div(call.n, 64) / gpu.sms * (ceil_div(call.k, 512) * c.stage + c.tile);
}

// A configuration of some_stream.cuh: rows a tile (of 512 columns), rows that are multiplied at once, and microseconds: of a launch
// and the kernel before it, of a tile besides its units, of a unit (128 input rows) besides its rows, of a unit for each `step` rows.
struct SomeCost {
  int variant, rows, step;
  double start, tile, unit, step_unit;
};
constexpr SomeCost kSomeCosts[] = {
    {kSome, 16, 4, 13.62, 0.632, 0.330, 0.251},
    {kSome + 1, 16, 4, 13.63, 0.427, 0.404, 0.234},
};

inline double some_cost(const Gpu& gpu, const Call& call, const SomeCost& c) {
  double work = 0;
  const int units = call.k / 128;
  for_rows(call, [&](int rows, double share) {
    const int steps = rows / c.rows * (c.rows / c.step) + ceil_div(rows % c.rows, c.step);
    work += share * (ceil_div(rows, c.rows) * (units * c.unit + c.tile) + steps * units * c.step_unit);
  });
  return c.start + work * call.experts * ceil_div(call.n, 512) / gpu.sms;
}

// Tiles of 16 rows and 256 columns are so few that narrow ones are better: not too many blocks then share each.
inline bool few_tiles(const Gpu& gpu, const Call& call) {
  const int blocks = std::min(call.rows, call.experts * ceil_div(ceil_div(call.rows, call.experts), 16));
  return static_cast<int64_t>(blocks) * ceil_div(call.n, 256) <= gpu.sms / 2;
}

// Some rows of each of several experts, on Hopper: the least cost of few_stream.cuh, some_stream.cuh and moe_wide.cuh. -1: another kernel.
template <typename F>
int hopper_choice(const Gpu& gpu, const Call& call, F&& fits) {
  const double mean = call.mean();
  // With short K some_stream.cuh alone, from about a row an expert on.
  const bool is_short = call.k < 1536;
  if (call.experts == 1 || (is_short && (mean < 0.75 || mean >= kManyRows))) return -1;
  int best = -1;
  double least = 0;
  auto offer = [&](int variant, double cost) {
    if (fits(variant) && (best < 0 || cost < least)) best = variant, least = cost;
  };
  const bool narrow = few_tiles(gpu, call);
  if (mean > 3.5 && narrow) return -1;
  if (mean <= 5 && !is_short)
    for (const StreamCost& c : kStreamCosts) offer(c.variant, stream_cost(gpu, call, c));
  for (const SomeCost& c : kSomeCosts) {
    if (narrow || (mean < 1 && !is_short)) continue;
    offer(c.variant, some_cost(gpu, call, c));
  }
  if (mean >= 12)
    for (const WideCost& c : kWideCosts) offer(c.variant, wide_cost(gpu, call, c));
  // Large tiles have large partial results (gemm_launch.cuh).
  for (const WideCost& c : kHalvesCosts)
    if (call.rows / call.experts >= kManyRows) offer(c.variant, wide_cost(gpu, call, c));
  return best;
}

// `has_wide`: what needs Hopper's own instructions is compiled. `fits(variant)`: the kernel's shared memory is there. Kernel 3's
// always is.
template <typename F>
int kernel_choice(const Gpu& gpu, const Call& call, bool has_wide, F&& fits) {
  const int hopper = has_wide && gpu.major == 9 ? hopper_choice(gpu, call, fits) : -1;
  if (hopper >= 0) return hopper;
  const int few = few_choice(gpu, call, fits);
  if (few >= 0) return few;
  const int mean = call.rows / call.experts;
  if (few_tiles(gpu, call)) return 3;
  if (has_wide && gpu.major == 9 && mean >= 18) return wide_choice(gpu, call, fits);
  for (int variant = mean <= 16 ? 0 : 1; variant < 3; ++variant)
    if (fits(variant)) return variant;
  return 3;
}

// CCQ-2T: trellis_few.cuh with one, two or four rows a tile (before Hopper + 3 with one, + 4 with four), trellis_some.cuh with 8 or 16,
// or moe_wide.cuh.
constexpr int kTrellisFew = 40, kTrellisSome = 45;

// Of trellis_few.cuh as StreamCost. Fitted to measurements on an H200 (eight shapes, 1 to 64 tokens, bfloat16), which all three tables
// meet within 2 to 5 % in the mean.
constexpr StreamCost kTrellisFewCosts[] = {
    {kTrellisFew, 1, 4.52, 0.300, 0.115}, {kTrellisFew + 1, 2, 6.26, 0.306, 0.145}, {kTrellisFew + 2, 4, 10.37, 0.336, 0.135},
};
// Of trellis_some.cuh, besides what a million values of activations take to become digits and to be read.
constexpr SomeCost kTrellisSomeCosts[] = {
    {kTrellisSome, 8, 4, 11.0, 0.317, 0.587, 0.110}, {kTrellisSome + 1, 16, 4, 11.5, 0.377, 0.565, 0.135},
};
constexpr double kTrellisDigits = 3.0;
// Of moe_wide.cuh.
constexpr WideCost kTrellisWideCosts[] = {
    {kWide, 512, 32, 1.875, 1.776, 1.95, 3},     {kWide + 1, 512, 48, 2.150, 1.942, 1.08, 3},
    {kWide + 2, 512, 64, 2.426, 1.992, 0.35, 3}, {kWide + 3, 256, 96, 1.560, 1.165, 0, 3},
    {kWide + 4, 256, 128, 1.894, 1.249, 0, 3},   {kWide + 5, 256, 144, 1.950, 1.950, 1, 3},
    {kWide + 6, 128, 256, 1.477, 0.829, 1.12, 3},
};

// Fewer tiles than multiprocessors are cut along K, into eight at most (waves.cuh).
inline double trellis_some_cost(const Gpu& gpu, const Call& call, const SomeCost& c) {
  const double waves = expected_blocks(call, c.rows) * ceil_div(call.n, 512) / gpu.sms;
  const double digits = kTrellisDigits * 1e-6 * call.rows * call.k;
  return c.start + digits + (some_cost(gpu, call, c) - c.start) * std::max(1.0, 1 / std::min(1.0, 8 * waves));
}

// -1: K is longer than any kernel for this GPU takes.
template <typename F>
int trellis_choice(const Gpu& gpu, const Call& call, bool has_wide, F&& fits) {
  const double mean = call.mean();
  const bool one = call.experts == 1 ? call.rows == 1 : mean <= 0.3;
  if (!has_wide || gpu.major != 9) {
    for (int variant : {one ? kTrellisFew + 3 : kTrellisFew + 4, kTrellisFew + 3})
      if (fits(variant)) return variant;
    return -1;
  }
  int best = -1;
  double least = 0;
  auto consider = [&](int variant, double cost) {
    if (fits(variant) && (best < 0 || cost < least)) best = variant, least = cost;
  };
  if (mean <= 8)
    for (const StreamCost& c : kTrellisFewCosts) consider(c.variant, stream_cost(gpu, call, c));
  if (mean <= 24)
    for (const SomeCost& c : kTrellisSomeCosts) consider(c.variant, trellis_some_cost(gpu, call, c));
  if (mean >= kManyRows || best < 0)
    for (const WideCost& c : kTrellisWideCosts) consider(c.variant, wide_cost(gpu, call, c));
  return best;
}

}  // namespace ccq
