// SPDX-License-Identifier: Apache-2.0
// ccq_encode as a Paddle op: the encoder's search, byte for byte that of the CPU.
#include <cstring>

#include "../gpu/encode/encode.h"
#include "common.h"

namespace ccq_paddle {

// A C structure that travels as int32 words (paddle_ccq/ops/gpu.py, encode_arguments): doubles keep all their bits.
template <typename T>
T FromWords(const char* attribute, const std::vector<int>& words) {
  if (words.size() * sizeof(int) != sizeof(T))
    fail("ccq_encode", attribute, "must be " + std::to_string(sizeof(T) / sizeof(int)) + " words, got " +
                                      std::to_string(words.size()));
  T value;
  std::memcpy(&value, words.data(), sizeof(T));
  return value;
}

// weight float32 [N, K], entries int32 [pairs, entries of all books, 2] -> words int16 [N, K/64, words], scales int16
// [N, K/64], supers float32 [N], pairs int32 [N], sums float64 [N, 3].
std::vector<paddle::Tensor> Encode(const paddle::Tensor& weight, const paddle::Tensor& entries, std::vector<int> layout,
                                   std::vector<int> recipe) {
  const std::string op = "ccq_encode";
  ccq_encode_args a{};
  a.layout = FromWords<ccq_encode_layout>("layout", layout);
  a.recipe = FromWords<ccq_encode_recipe>("recipe", recipe);
  expect(op, "weight", weight, paddle::DataType::FLOAT32, {-1, -1});
  a.n = weight.shape()[0], a.k = weight.shape()[1];
  if (a.n == 0 || a.k == 0 || a.k % 64) fail(op, "weight", "needs K a multiple of 64, got " + text(weight.shape()));
  int count = a.layout.entries[0];
  if (a.layout.books > 1) count += a.layout.entries[1];
  expect(op, "entries", entries, paddle::DataType::INT32, {-1, count, 2});
  const auto place = weight.place();
  const int64_t groups = a.k / 64;
  auto words = paddle::empty({a.n, groups, a.layout.words}, paddle::DataType::INT16, place);
  auto scales = paddle::empty({a.n, groups}, paddle::DataType::INT16, place);
  auto supers = paddle::empty({a.n}, paddle::DataType::FLOAT32, place);
  auto pairs = paddle::empty({a.n}, paddle::DataType::INT32, place);
  auto sums = paddle::empty({a.n, 3}, paddle::DataType::FLOAT64, place);
  a.pairs = static_cast<int>(entries.shape()[0]);
  const auto bytes = static_cast<int64_t>(ccq_encode_workspace(a.k, a.pairs));
  auto workspace = paddle::empty({bytes}, paddle::DataType::UINT8, place);
  a.weight = weight.data<float>();
  a.entries = entries.data<int32_t>();
  a.words = reinterpret_cast<uint16_t*>(words.data<int16_t>());
  a.scales = reinterpret_cast<uint16_t*>(scales.data<int16_t>());
  a.supers = supers.data<float>(), a.chosen = pairs.data<int32_t>(), a.sums = sums.data<double>();
  a.workspace = workspace.data();
  check(op, ccq_encode(&a, weight.stream()));
  return {words, scales, supers, pairs, sums};
}

std::vector<Shape> EncodeShape(Shape weight, Shape, std::vector<int> layout, std::vector<int>) {
  const int64_t n = weight[0], groups = weight[1] / 64;
  return {{n, groups, FromWords<ccq_encode_layout>("layout", layout).words}, {n, groups}, {n}, {n}, {n, 3}};
}

std::vector<paddle::DataType> EncodeType(paddle::DataType, paddle::DataType, std::vector<int>, std::vector<int>) {
  return {paddle::DataType::INT16, paddle::DataType::INT16, paddle::DataType::FLOAT32, paddle::DataType::INT32,
          paddle::DataType::FLOAT64};
}

}  // namespace ccq_paddle

PD_BUILD_OP(ccq_encode)
    .Inputs({"weight", "entries"})
    .Outputs({"words", "scales", "supers", "pairs", "sums"})
    .Attrs({"layout: std::vector<int>", "recipe: std::vector<int>"})
    .SetKernelFn(PD_KERNEL(ccq_paddle::Encode))
    .SetInferShapeFn(PD_INFER_SHAPE(ccq_paddle::EncodeShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ccq_paddle::EncodeType));
