// SPDX-License-Identifier: Apache-2.0
// ccq_linear_stored, ccq_moe_gemm_stored, ccq_moe_ffn_stored and ccq_moe_stored as Paddle ops: 2.5 and 2.75 bits, the
// tensors as a checkpoint has them (stacked over experts).
#include "../gpu/moe/activation.h"
#include "../gpu/moe/dispatch.h"
#include "../gpu/moe/linear_ccq.h"
#include "common.h"

namespace ccq_paddle {

using Tensors = std::vector<paddle::Tensor>;
using Types = std::vector<paddle::DataType>;

// quant_weight and super_scales of one projection of E experts, and the K and N they stand for.
struct Stored {
  const void* quant;
  const uint16_t* supers;
  int format, experts, k, n;

  Stored(const std::string& op, const std::string& prefix, const paddle::Tensor& quant_weight,
         const paddle::Tensor& super_scales, const std::string& name) {
    if (name != "ccq-2.5" && name != "ccq-2.75") fail(op, "format", "must be ccq-2.5 or ccq-2.75, got " + name);
    format = name == "ccq-2.5" ? CCQ_CCQ25 : CCQ_CCQ275;
    const int words = format == CCQ_CCQ25 ? 10 : 22;
    const auto type = format == CCQ_CCQ25 ? paddle::DataType::INT16 : paddle::DataType::UINT8;
    expect(op, (prefix + "quant_weight").c_str(), quant_weight, type, {-1, -1, -1});
    const Shape shape = quant_weight.shape();
    if (shape[1] == 0 || shape[1] % words || shape[2] == 0 || shape[2] % 16)
      fail(op, prefix + "quant_weight", "needs K a multiple of 64 and N of 16, got " + text(shape));
    expect(op, (prefix + "super_scales").c_str(), super_scales, paddle::DataType::BFLOAT16, {shape[0], shape[2]});
    quant = quant_weight.data();
    supers = static_cast<const uint16_t*>(super_scales.data());
    experts = static_cast<int>(shape[0]);
    k = static_cast<int>(shape[1] / words * 64);
    n = static_cast<int>(shape[2]);
  }
};

paddle::Tensor Product(const std::string& op, const paddle::Tensor& x, const int64_t* offsets, const Stored& w,
                       const float* row_scale, const std::string& order) {
  const int type = half_type(op, "x", x);
  expect(op, "x", x, x.dtype(), {-1, w.k});
  const int rows = static_cast<int>(x.shape()[0]);
  auto out = paddle::empty({rows, w.n}, x.dtype(), x.place());
  ccq_spare_gemm_args a{};
  a.x = x.data(), a.offsets = offsets, a.quant_weight = w.quant, a.super_scales = w.supers, a.row_scale = row_scale;
  a.out = out.data(), a.rows = rows, a.k = w.k, a.n = w.n, a.experts = w.experts;
  a.format = w.format, a.dtype = type, a.row_order = row_order(op, order);
  check(op, ccq_spare_gemm(&a, x.stream()));
  return out;
}

Tensors LinearStored(const paddle::Tensor& x, const paddle::Tensor& quant, const paddle::Tensor& supers,
                     std::string format, std::string order) {
  const std::string op = "ccq_linear_stored";
  const Stored w(op, "", quant, supers, format);
  if (w.experts != 1) fail(op, "quant_weight", "must hold one matrix");
  return {Product(op, x, nullptr, w, nullptr, order)};
}

Tensors MoeGemmStored(const paddle::Tensor& x, const paddle::Tensor& offsets, const paddle::Tensor& quant,
                      const paddle::Tensor& supers, const paddle::optional<paddle::Tensor>& row_scale,
                      std::string format, std::string order) {
  const std::string op = "ccq_moe_gemm_stored";
  const Stored w(op, "", quant, supers, format);
  expect(op, "offsets", offsets, paddle::DataType::INT64, {w.experts});
  if (row_scale) expect(op, "row_scale", *row_scale, paddle::DataType::FLOAT32, {x.shape()[0]});
  return {Product(op, x, offsets.data<int64_t>(), w, row_scale ? row_scale->data<float>() : nullptr, order)};
}

// down(silu(gate(x)) * up(x)) of rows sorted by expert.
paddle::Tensor Ffn(const std::string& op, const paddle::Tensor& x, const int64_t* offsets, const Stored& up,
                   const Stored& down, const std::string& order) {
  if (up.experts != down.experts || up.k != down.n || up.n != 2 * down.k)
    fail(op, "down_quant_weight", "does not belong to up_gate_quant_weight");
  const auto both = Product(op, x, offsets, up, nullptr, order);
  const int rows = static_cast<int>(x.shape()[0]);
  auto middle = paddle::empty({rows, down.k}, x.dtype(), x.place());
  check(op, ccq_swiglu(both.data(), middle.data(), rows, down.k, half_type(op, "x", x), x.stream()));
  return Product(op, middle, offsets, down, nullptr, order);
}

Tensors MoeFfnStored(const paddle::Tensor& x, const paddle::Tensor& offsets, const paddle::Tensor& up_quant,
                     const paddle::Tensor& up_supers, const paddle::Tensor& down_quant,
                     const paddle::Tensor& down_supers, std::string format, std::string order) {
  const std::string op = "ccq_moe_ffn_stored";
  const Stored up(op, "up_gate_", up_quant, up_supers, format), down(op, "down_", down_quant, down_supers, format);
  expect(op, "offsets", offsets, paddle::DataType::INT64, {up.experts});
  return {Ffn(op, x, offsets.data<int64_t>(), up, down, order)};
}

Tensors MoeStored(const paddle::Tensor& x, const paddle::Tensor& ids, const paddle::Tensor& weights,
                  const paddle::Tensor& up_quant, const paddle::Tensor& up_supers, const paddle::Tensor& down_quant,
                  const paddle::Tensor& down_supers, std::string format, std::string order) {
  const std::string op = "ccq_moe_stored";
  const Stored up(op, "up_gate_", up_quant, up_supers, format), down(op, "down_", down_quant, down_supers, format);
  const int type = half_type(op, "x", x);
  expect(op, "x", x, x.dtype(), {-1, up.k});
  const int tokens = static_cast<int>(x.shape()[0]);
  expect(op, "topk_ids", ids, paddle::DataType::INT64, {tokens, -1});
  const int top_k = static_cast<int>(ids.shape()[1]);
  expect(op, "topk_weights", weights, paddle::DataType::FLOAT32, {tokens, top_k});
  const auto place = x.place();
  auto offsets = paddle::empty({up.experts}, paddle::DataType::INT64, place);
  auto rows_of = paddle::empty({tokens, top_k}, paddle::DataType::INT32, place);
  auto sorted = paddle::empty({tokens * top_k, up.k}, x.dtype(), place);
  auto out = paddle::empty({tokens, up.k}, x.dtype(), place);
  check(op, ccq_moe_dispatch(ids.data<int64_t>(), x.data(), tokens, top_k, up.experts, up.k, offsets.data<int64_t>(),
                             rows_of.data<int32_t>(), sorted.data(), x.stream()));
  const auto result = Ffn(op, sorted, offsets.data<int64_t>(), up, down, order);
  check(op, ccq_moe_combine(result.data(), rows_of.data<int32_t>(), weights.data<float>(), tokens, top_k, up.k, type,
                            out.data(), x.stream()));
  return {out};
}

std::vector<Shape> LinearStoredShape(Shape x, Shape quant, Shape) { return {{x[0], quant[2]}}; }
Types LinearStoredType(paddle::DataType x, paddle::DataType, paddle::DataType) { return {x}; }

std::vector<Shape> MoeGemmStoredShape(Shape x, Shape, Shape quant, Shape, const paddle::optional<Shape>&) {
  return {{x[0], quant[2]}};
}
Types MoeGemmStoredType(paddle::DataType x, paddle::DataType, paddle::DataType, paddle::DataType,
                        const paddle::optional<paddle::DataType>&) {
  return {x};
}

std::vector<Shape> MoeFfnStoredShape(Shape x, Shape, Shape, Shape, Shape, Shape) { return {x}; }
Types MoeFfnStoredType(paddle::DataType x, paddle::DataType, paddle::DataType, paddle::DataType, paddle::DataType,
                       paddle::DataType) {
  return {x};
}

std::vector<Shape> MoeStoredShape(Shape x, Shape, Shape, Shape, Shape, Shape, Shape) { return {x}; }
Types MoeStoredType(paddle::DataType x, paddle::DataType, paddle::DataType, paddle::DataType, paddle::DataType,
                    paddle::DataType, paddle::DataType) {
  return {x};
}

}  // namespace ccq_paddle

PD_BUILD_OP(ccq_linear_stored)
    .Inputs({"x", "quant_weight", "super_scales"})
    .Outputs({"out"})
    .Attrs({"format: std::string", "row_order: std::string"})
    .SetKernelFn(PD_KERNEL(ccq_paddle::LinearStored))
    .SetInferShapeFn(PD_INFER_SHAPE(ccq_paddle::LinearStoredShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ccq_paddle::LinearStoredType));

PD_BUILD_OP(ccq_moe_gemm_stored)
    .Inputs({"x", "offsets", "quant_weight", "super_scales", paddle::Optional("row_scale")})
    .Outputs({"out"})
    .Attrs({"format: std::string", "row_order: std::string"})
    .SetKernelFn(PD_KERNEL(ccq_paddle::MoeGemmStored))
    .SetInferShapeFn(PD_INFER_SHAPE(ccq_paddle::MoeGemmStoredShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ccq_paddle::MoeGemmStoredType));

PD_BUILD_OP(ccq_moe_ffn_stored)
    .Inputs({"x", "offsets", "up_gate_quant_weight", "up_gate_super_scales", "down_quant_weight",
             "down_super_scales"})
    .Outputs({"out"})
    .Attrs({"format: std::string", "row_order: std::string"})
    .SetKernelFn(PD_KERNEL(ccq_paddle::MoeFfnStored))
    .SetInferShapeFn(PD_INFER_SHAPE(ccq_paddle::MoeFfnStoredShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ccq_paddle::MoeFfnStoredType));

PD_BUILD_OP(ccq_moe_stored)
    .Inputs({"x", "topk_ids", "topk_weights", "up_gate_quant_weight", "up_gate_super_scales", "down_quant_weight",
             "down_super_scales"})
    .Outputs({"out"})
    .Attrs({"format: std::string", "row_order: std::string"})
    .SetKernelFn(PD_KERNEL(ccq_paddle::MoeStored))
    .SetInferShapeFn(PD_INFER_SHAPE(ccq_paddle::MoeStoredShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ccq_paddle::MoeStoredType));
