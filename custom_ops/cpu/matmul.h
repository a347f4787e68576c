// SPDX-License-Identifier: Apache-2.0
// y = x W with W packed: the layout that the CPU streams, and the interface of its kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace ccq {

constexpr int kRows = 64;      // rows of W that share a local scale
constexpr int kColumns = 16;   // columns decoded side by side: one 512-bit register of 32-bit lanes
constexpr int kPairs = 32;     // a group's rows, two to a 32-bit lane
constexpr int kTokens = 64;    // tokens that share one decoding of a column block

enum class Format { kWint2, kCcq25, kCcq275, kCcq2t };

struct FormatInfo {
  const char* name;
  int words;        // stored words per group
  int word_bytes;
  int zero;         // the state that stands for 0
  int scale_bits;   // of the local scale
};
const FormatInfo& info(Format format);
// Local scales in a tensor of their own, two groups a byte.
constexpr bool has_scales(Format f) { return f == Format::kWint2 || f == Format::kCcq2t; }

// Zero-filled memory on a 64-byte boundary: a decoder's 64-byte load never straddles a line.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  uint8_t* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t size_;
};

// One matrix [k, n] in blocks of 16 columns, each block one run of memory.
//   WINT2 and ccq-2t: words [n/16][k/64][4][16 columns][4 byte rows]; scales [n/16][k/128][16], as stored.
//   others: words [n/16][k/64][words][16 columns]; no scales (they stand in the last words).
struct Packed {
  Packed(Format format, int64_t k, int64_t n);
  int64_t groups() const { return k / kRows; }
  int64_t blocks() const { return n / kColumns; }

  Format format;
  int64_t k, n;
  Buffer words, scales;
  std::vector<float> super;       // [n]
  std::vector<float> code_scale;  // [n], WINT2 only
  std::vector<float> code_zp;
  std::vector<uint8_t> before;    // [n], ccq-2t only: the byte before each column's first one
  // Every code of every column is a whole number in 0..32767: decoded in 16-bit integers.
  bool integer = false;
};

// A group's activations as 16-bit integers with one scale, in the order of the pairs. The largest
// |value| is 32767, so a group's sum with 6-bit states (63 * 32767 * 64) fits 32 bits.
struct Level {
  explicit Level(int64_t groups_times_rows);
  struct Free {
    void operator()(int32_t* p) const { std::free(p); }
  };
  std::unique_ptr<int32_t, Free> pairs;  // [groups][rows][kPairs]: row low(j) in the low half, high(j) above
  std::vector<float> scale;              // [groups][rows]
  std::vector<int32_t> sum;              // [groups][rows]: sum of the group's integers
};

// x = main + rest. The rest is there (scale not 0) for groups in which an outlier leaves the other
// activations few bits, or for all groups where asked for.
struct Activations {
  Activations(int64_t r, int64_t g) : rows(r), groups(g), main(r * g), rest(r * g) {}
  int64_t rows, groups;
  Level main, rest;
};

// Rows of pair j: byte rows 0 and 2, or 1 and 3, of a 64-byte vector (16 rows) share a lane. ccq-2t pairs
// neighbours, rows 2j and 2j + 1, instead.
constexpr int low_row(int j) { return 16 * (j / 8) + 4 * (j / 4 % 2) + j % 4; }
constexpr int high_row(int j) { return low_row(j) + 8; }

// x float32 [rows, k]; order[s] is the input row (inside its group) that stored row s multiplies.
// fine: a rest for every group, 31 bits in all instead of 16.
Activations quantize(const float* x, int64_t rows, int64_t k, const int* order, bool fine, int threads);

// y[r, 0..16) = rows first .. first + count of x times column block `block`; stride of y in floats.
using BlockFn = void (*)(const Packed& w, int64_t block, const Activations& x, int64_t first, int count,
                         float* y, int64_t stride);

struct MatmulKernels {
  const char* name;
  BlockFn block;
};
const MatmulKernels* matmul_plain();
const MatmulKernels* matmul_avx2();
const MatmulKernels* matmul_avx512();
const MatmulKernels* matmul_avx512vnni();
// Names as in pick_kernels(); nullptr if the processor or build has no such instruction set.
const MatmulKernels* pick_matmul(const char* name);

// y float32 [rows, n]; rows ends[e-1] .. ends[e] are multiplied by matrix e (all of one shape).
// Each output is summed by one thread in one order: the same bytes for any thread count.
void multiply(const MatmulKernels& kernels, const std::vector<const Packed*>& matrices,
              const int64_t* ends, const float* x, const int* order, bool fine, float* y, int threads);

// y[r, i] = silu(x[r, i]) * x[r, half + i]
void swiglu(const float* x, int64_t rows, int64_t half, float* y, int threads);

}  // namespace ccq
