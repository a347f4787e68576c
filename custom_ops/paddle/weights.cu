// SPDX-License-Identifier: Apache-2.0
// ccq_repack, ccq_repack_trellis and ccq_dequant as Paddle ops.
#include "../gpu/common/dequant.h"
#include "common.h"

namespace ccq_paddle {

// Checkpoint tensors of E experts (stacked) -> quant [E, N/16, K/128, 512], scales [E, N/16, K/128, 16],
// columns int32 [2, E, N/16, 32], pair_kind int32 [1]: 0 if all pairs are integers.
std::vector<paddle::Tensor> Repack(const paddle::Tensor& quant_weight, const paddle::Tensor& weight_scale,
                                   const paddle::Tensor& super_scales, const paddle::Tensor& code_scale,
                                   const paddle::Tensor& code_zp) {
  const std::string op = "ccq_repack";
  expect(op, "quant_weight", quant_weight, paddle::DataType::UINT8, {-1, -1, -1});
  const int64_t e = quant_weight.shape()[0], k = quant_weight.shape()[1] * 4, n = quant_weight.shape()[2];
  if (k % 128 || n % 16 || k == 0 || n == 0) fail(op, "quant_weight", "needs K a multiple of 128 and N of 16");
  expect(op, "weight_scale", weight_scale, paddle::DataType::UINT8, {e, k / 128, n});
  const int super_type = half_type(op, "super_scales", super_scales);
  expect(op, "super_scales", super_scales, super_scales.dtype(), {e, n});
  expect(op, "code_scale", code_scale, paddle::DataType::FLOAT32, {e, n});
  expect(op, "code_zp", code_zp, paddle::DataType::FLOAT32, {e, n});
  const auto place = quant_weight.place();
  auto quant = paddle::empty({e, n / 16, k / 128, 512}, paddle::DataType::UINT8, place);
  auto scales = paddle::empty({e, n / 16, k / 128, 16}, paddle::DataType::UINT8, place);
  auto columns = paddle::empty({2, e, n / 16, 32}, paddle::DataType::INT32, place);
  auto kind = paddle::empty({1}, paddle::DataType::INT32, place);
  check(op, ccq_repack_wint2(quant_weight.data<uint8_t>(), weight_scale.data<uint8_t>(), super_scales.data(),
                             super_type, code_scale.data<float>(), code_zp.data<float>(), static_cast<int>(e),
                             static_cast<int>(k), static_cast<int>(n), quant.data<uint8_t>(), scales.data<uint8_t>(),
                             reinterpret_cast<uint32_t*>(columns.data<int32_t>()), kind.data<int32_t>(),
                             quant_weight.stream()));
  return {quant, scales, columns, kind};
}

std::vector<Shape> RepackShape(Shape quant_weight, Shape, Shape, Shape, Shape) {
  const int64_t e = quant_weight[0], k = quant_weight[1] * 4, n = quant_weight[2];
  return {{e, n / 16, k / 128, 512}, {e, n / 16, k / 128, 16}, {2, e, n / 16, 32}, {1}};
}

std::vector<paddle::DataType> RepackType(paddle::DataType, paddle::DataType, paddle::DataType, paddle::DataType,
                                         paddle::DataType) {
  return {paddle::DataType::UINT8, paddle::DataType::UINT8, paddle::DataType::INT32, paddle::DataType::INT32};
}

// CCQ-2T's checkpoint tensors of E experts (stacked) -> quant [E, ceil(N/64), K/128, 2176], scales [E, N/16, 1, 1] (empty of meaning:
// it tells N, and stands where WINT2 has scales), columns float32 [E, ceil(N/64) * 64].
std::vector<paddle::Tensor> RepackTrellis(const paddle::Tensor& quant_weight, const paddle::Tensor& weight_scale,
                                          const paddle::Tensor& super_scales) {
  const std::string op = "ccq_repack_trellis";
  expect(op, "quant_weight", quant_weight, paddle::DataType::UINT8, {-1, -1, -1});
  const int64_t e = quant_weight.shape()[0], k = quant_weight.shape()[1] * 4, n = quant_weight.shape()[2];
  if (k % 128 || n % 16 || k == 0 || n == 0) fail(op, "quant_weight", "needs K a multiple of 128 and N of 16");
  expect(op, "weight_scale", weight_scale, paddle::DataType::UINT8, {e, k / 128, n});
  const int super_type = half_type(op, "super_scales", super_scales);
  expect(op, "super_scales", super_scales, super_scales.dtype(), {e, n});
  const auto place = quant_weight.place();
  const int64_t fours = (n + 63) / 64;
  auto quant = paddle::empty({e, fours, k / 128, Weights::kTrellisUnitBytes}, paddle::DataType::UINT8, place);
  auto scales = paddle::full({e, n / 16, 1, 1}, 0, paddle::DataType::UINT8, place);
  auto columns = paddle::empty({e, fours * 64}, paddle::DataType::FLOAT32, place);
  check(op, ccq_repack_trellis(quant_weight.data<uint8_t>(), weight_scale.data<uint8_t>(), super_scales.data(), super_type, nullptr,
                               static_cast<int>(e), static_cast<int>(k), static_cast<int>(n), quant.data<uint8_t>(),
                               columns.data<float>(), quant_weight.stream()));
  return {quant, scales, columns};
}

std::vector<Shape> RepackTrellisShape(Shape quant_weight, Shape, Shape) {
  const int64_t e = quant_weight[0], k = quant_weight[1] * 4, n = quant_weight[2], fours = (n + 63) / 64;
  return {{e, fours, k / 128, Weights::kTrellisUnitBytes}, {e, n / 16, 1, 1}, {e, fours * 64}};
}

std::vector<paddle::DataType> RepackTrellisType(paddle::DataType, paddle::DataType, paddle::DataType) {
  return {paddle::DataType::UINT8, paddle::DataType::UINT8, paddle::DataType::FLOAT32};
}

paddle::DataType RuntimeType(const std::string& dtype) {
  if (dtype == "bfloat16") return paddle::DataType::BFLOAT16;
  if (dtype == "float16") return paddle::DataType::FLOAT16;
  if (dtype == "float32") return paddle::DataType::FLOAT32;
  fail("ccq_dequant", "dtype", "must be bfloat16, float16 or float32, got " + dtype);
  return paddle::DataType::UNDEFINED;
}

// Words of a 64-group, which tell K from the stored rows.
int64_t GroupWords(const std::string& format) {
  if (format == "wint2") return 16;
  if (format == "ccq-2.5") return 10;
  if (format == "ccq-2.75") return 22;
  fail("ccq_dequant", "format", "must be wint2, ccq-2.5 or ccq-2.75, got " + format);
  return 0;
}

// One matrix of any format -> [K, N]; the last three tensors belong to wint2 alone.
std::vector<paddle::Tensor> Dequant(const paddle::Tensor& quant_weight, const paddle::Tensor& super_scales,
                                    const paddle::optional<paddle::Tensor>& weight_scale,
                                    const paddle::optional<paddle::Tensor>& code_scale,
                                    const paddle::optional<paddle::Tensor>& code_zp, std::string format,
                                    std::string dtype) {
  const std::string op = "ccq_dequant";
  const bool wide = format == "ccq-2.5";
  expect(op, "quant_weight", quant_weight, wide ? paddle::DataType::INT16 : paddle::DataType::UINT8, {-1, -1});
  const int64_t words = GroupWords(format), rows = quant_weight.shape()[0], n = quant_weight.shape()[1];
  const int64_t k = rows / words * 64;
  if (rows % words || k == 0 || (format == "wint2" && k % 128)) fail(op, "quant_weight", "has rows of no whole group");
  expect(op, "super_scales", super_scales, paddle::DataType::BFLOAT16, {n});
  const auto type = RuntimeType(dtype);
  auto out = paddle::empty({k, n}, type, quant_weight.place());
  ccq_dequant_args a{};
  a.format = wide ? CCQ_CCQ25 : format == "wint2" ? CCQ_WINT2 : CCQ_CCQ275;
  a.runtime = type == paddle::DataType::BFLOAT16 ? CCQ_RUNTIME_BF16
              : type == paddle::DataType::FLOAT16 ? CCQ_RUNTIME_FP16 : CCQ_RUNTIME_FP32;
  a.k = k, a.n = n, a.quant_weight = quant_weight.data(), a.out = out.data();
  a.super_scales = static_cast<const uint16_t*>(super_scales.data());
  if (format == "wint2") {
    if (!weight_scale || !code_scale || !code_zp) fail(op, "weight_scale, code_scale, code_zp", "are needed by wint2");
    expect(op, "weight_scale", *weight_scale, paddle::DataType::UINT8, {k / 128, n});
    expect(op, "code_scale", *code_scale, paddle::DataType::FLOAT32, {n});
    expect(op, "code_zp", *code_zp, paddle::DataType::FLOAT32, {n});
    a.weight_scale = weight_scale->data<uint8_t>();
    a.code_scale = code_scale->data<float>();
    a.code_zp = code_zp->data<float>();
  }
  check(op, ccq_dequant(&a, quant_weight.stream()));
  return {out};
}

std::vector<Shape> DequantShape(Shape quant_weight, Shape, const paddle::optional<Shape>&,
                                const paddle::optional<Shape>&, const paddle::optional<Shape>&, std::string format,
                                std::string) {
  return {{quant_weight[0] / GroupWords(format) * 64, quant_weight[1]}};
}

std::vector<paddle::DataType> DequantType(paddle::DataType, paddle::DataType,
                                          const paddle::optional<paddle::DataType>&,
                                          const paddle::optional<paddle::DataType>&,
                                          const paddle::optional<paddle::DataType>&, std::string, std::string dtype) {
  return {RuntimeType(dtype)};
}

}  // namespace ccq_paddle

PD_BUILD_OP(ccq_repack)
    .Inputs({"quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp"})
    .Outputs({"quant", "scales", "columns", "pair_kind"})
    .SetKernelFn(PD_KERNEL(ccq_paddle::Repack))
    .SetInferShapeFn(PD_INFER_SHAPE(ccq_paddle::RepackShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ccq_paddle::RepackType));

PD_BUILD_OP(ccq_repack_trellis)
    .Inputs({"quant_weight", "weight_scale", "super_scales"})
    .Outputs({"quant", "scales", "columns"})
    .SetKernelFn(PD_KERNEL(ccq_paddle::RepackTrellis))
    .SetInferShapeFn(PD_INFER_SHAPE(ccq_paddle::RepackTrellisShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ccq_paddle::RepackTrellisType));

PD_BUILD_OP(ccq_dequant)
    .Inputs({"quant_weight", "super_scales", paddle::Optional("weight_scale"), paddle::Optional("code_scale"),
             paddle::Optional("code_zp")})
    .Outputs({"out"})
    .Attrs({"format: std::string", "dtype: std::string"})
    .SetKernelFn(PD_KERNEL(ccq_paddle::Dequant))
    .SetInferShapeFn(PD_INFER_SHAPE(ccq_paddle::DequantShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ccq_paddle::DequantType));
