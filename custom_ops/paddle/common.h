// SPDX-License-Identifier: Apache-2.0
// Argument checks of the Paddle ops: an error names the op and the argument.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "../gpu/moe/moe_block.h"
#include "../gpu/moe/trellis_repack.h"
#include "paddle/extension.h"

namespace ccq_paddle {

using Shape = std::vector<int64_t>;

inline std::string text(const Shape& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + (shape[i] < 0 ? "any" : std::to_string(shape[i]));
  return s + "]";
}

inline void fail(const std::string& op, const std::string& argument, const std::string& what) {
  PD_THROW(op + ": " + argument + " " + what);
}

// A dense tensor on the GPU of this type and shape (-1: any size).
inline void expect(const std::string& op, const char* argument, const paddle::Tensor& t, paddle::DataType dtype,
                   const Shape& shape) {
  if (!t.is_gpu()) fail(op, argument, "must be on a GPU");
  if (t.dtype() != dtype) fail(op, argument, "has the wrong dtype");
  const Shape found = t.shape();
  bool fits = found.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || shape[i] == found[i];
  if (!fits) fail(op, argument, "must be " + text(shape) + ", got " + text(found));
}

inline int half_type(const std::string& op, const char* argument, const paddle::Tensor& t) {
  if (t.dtype() == paddle::DataType::BFLOAT16) return CCQ_BF16;
  if (t.dtype() == paddle::DataType::FLOAT16) return CCQ_FP16;
  fail(op, argument, "must be bfloat16 or float16");
  return -1;
}

inline int row_order(const std::string& op, const std::string& name) {
  if (name == "plain") return CCQ_ROWS_PLAIN;
  if (name == "fastdeploy-2.1") return CCQ_ROWS_FASTDEPLOY;
  fail(op, "row_order", "must be plain or fastdeploy-2.1, got " + name);
  return -1;
}

inline void check(const std::string& op, cudaError_t error) {
  if (error != cudaSuccess) PD_THROW(op + ": " + std::string(cudaGetErrorString(error)));
}

// The three tensors that ccq_repack or ccq_repack_trellis returns for one projection of E experts, and the K and N they stand for.
struct Weights {
  static constexpr int kTrellisUnitBytes = 2176;  // trellis_repack.h
  ccq_moe_projection projection;
  int experts, k, n;

  Weights(const std::string& op, const std::string& prefix, const paddle::Tensor& quant, const paddle::Tensor& scales,
          const paddle::Tensor& columns, bool integer_pairs) {
    expect(op, (prefix + "quant").c_str(), quant, paddle::DataType::UINT8, {-1, -1, -1, -1});
    const Shape shape = quant.shape();
    experts = static_cast<int>(shape[0]);
    k = static_cast<int>(shape[2] * 128);
    projection.quant = quant.data<uint8_t>();
    if (shape[3] == kTrellisUnitBytes) {
      expect(op, (prefix + "scales").c_str(), scales, paddle::DataType::UINT8, {shape[0], -1, 1, 1});
      const int64_t tiles = scales.shape()[1];
      if ((tiles + 3) / 4 != shape[1]) fail(op, (prefix + "scales").c_str(), "does not belong to quant");
      expect(op, (prefix + "columns").c_str(), columns, paddle::DataType::FLOAT32, {shape[0], shape[1] * 64});
      n = static_cast<int>(tiles * 16);
      projection.scales = nullptr;
      projection.columns = reinterpret_cast<const uint32_t*>(columns.data<float>());
      projection.pairs = CCQ_PAIRS_TRELLIS;
      return;
    }
    expect(op, (prefix + "quant").c_str(), quant, paddle::DataType::UINT8, {-1, -1, -1, 512});
    expect(op, (prefix + "scales").c_str(), scales, paddle::DataType::UINT8, {shape[0], shape[1], shape[2], 16});
    expect(op, (prefix + "columns").c_str(), columns, paddle::DataType::INT32, {2, shape[0], shape[1], 32});
    n = static_cast<int>(shape[1] * 16);
    projection.scales = scales.data<uint8_t>();
    projection.columns = reinterpret_cast<const uint32_t*>(columns.data<int32_t>());
    projection.pairs = integer_pairs ? CCQ_PAIRS_INTEGER : CCQ_PAIRS_GENERAL;
  }
};

}  // namespace ccq_paddle
