// SPDX-License-Identifier: Apache-2.0
// ccq_linear, ccq_moe_gemm, ccq_moe_ffn and ccq_moe as Paddle ops, over the tensors that ccq_repack and ccq_repack_trellis return.
#include "common.h"

namespace ccq_paddle {

using Tensors = std::vector<paddle::Tensor>;
using Types = std::vector<paddle::DataType>;

paddle::Tensor Workspace(size_t bytes, const paddle::Tensor& like) {
  return paddle::empty({static_cast<int64_t>(bytes)}, paddle::DataType::UINT8, like.place());
}

Tensors Gemm(const std::string& op, const paddle::Tensor& x, const int64_t* offsets, const Weights& w,
             const float* row_scale, const std::string& order) {
  const int type = half_type(op, "x", x);
  expect(op, "x", x, x.dtype(), {-1, w.k});
  const int rows = static_cast<int>(x.shape()[0]);
  auto out = paddle::empty({rows, w.n}, x.dtype(), x.place());
  auto workspace = Workspace(ccq_moe_gemm_workspace(rows, w.k, w.n, w.experts), x);
  ccq_moe_gemm_args a{};
  a.x = x.data(), a.offsets = offsets, a.row_scale = row_scale, a.out = out.data(), a.workspace = workspace.data();
  a.quant = w.projection.quant, a.scales = w.projection.scales, a.columns = w.projection.columns;
  a.rows = rows, a.k = w.k, a.n = w.n, a.experts = w.experts;
  a.dtype = type, a.pairs = w.projection.pairs, a.row_order = row_order(op, order);
  check(op, ccq_moe_gemm(&a, x.stream()));
  return {out};
}

Tensors Linear(const paddle::Tensor& x, const paddle::Tensor& quant, const paddle::Tensor& scales,
               const paddle::Tensor& columns, bool integer_pairs, std::string order) {
  const Weights w("ccq_linear", "", quant, scales, columns, integer_pairs);
  if (w.experts != 1) fail("ccq_linear", "quant", "must hold one matrix");
  return Gemm("ccq_linear", x, nullptr, w, nullptr, order);
}

Tensors MoeGemm(const paddle::Tensor& x, const paddle::Tensor& offsets, const paddle::Tensor& quant,
                const paddle::Tensor& scales, const paddle::Tensor& columns,
                const paddle::optional<paddle::Tensor>& row_scale, bool integer_pairs, std::string order) {
  const std::string op = "ccq_moe_gemm";
  const Weights w(op, "", quant, scales, columns, integer_pairs);
  expect(op, "offsets", offsets, paddle::DataType::INT64, {w.experts});
  if (row_scale) expect(op, "row_scale", *row_scale, paddle::DataType::FLOAT32, {x.shape()[0]});
  return Gemm(op, x, offsets.data<int64_t>(), w, row_scale ? row_scale->data<float>() : nullptr, order);
}

ccq_moe_shape BlockShape(const std::string& op, const paddle::Tensor& x, const Weights& up, const Weights& down,
                         const std::string& order) {
  if (up.experts != down.experts || up.k != down.n || up.n != 2 * down.k)
    fail(op, "down_quant", "does not belong to up_gate_quant");
  ccq_moe_shape s{};
  s.hidden = up.k, s.width = down.k, s.experts = up.experts;
  s.dtype = half_type(op, "x", x), s.row_order = row_order(op, order);
  expect(op, "x", x, x.dtype(), {-1, up.k});
  return s;
}

Tensors MoeFfn(const paddle::Tensor& x, const paddle::Tensor& offsets, const paddle::Tensor& up_quant,
               const paddle::Tensor& up_scales, const paddle::Tensor& up_columns, const paddle::Tensor& down_quant,
               const paddle::Tensor& down_scales, const paddle::Tensor& down_columns, bool up_integer,
               bool down_integer, std::string order) {
  const std::string op = "ccq_moe_ffn";
  const Weights up(op, "up_gate_", up_quant, up_scales, up_columns, up_integer);
  const Weights down(op, "down_", down_quant, down_scales, down_columns, down_integer);
  const ccq_moe_shape s = BlockShape(op, x, up, down, order);
  expect(op, "offsets", offsets, paddle::DataType::INT64, {s.experts});
  const int rows = static_cast<int>(x.shape()[0]);
  auto out = paddle::empty({rows, s.hidden}, x.dtype(), x.place());
  auto workspace = Workspace(ccq_moe_ffn_workspace(rows, &s), x);
  check(op, ccq_moe_ffn(x.data(), offsets.data<int64_t>(), rows, &s, &up.projection, &down.projection, out.data(),
                        workspace.data(), x.stream()));
  return {out};
}

Tensors Moe(const paddle::Tensor& x, const paddle::Tensor& ids, const paddle::Tensor& weights,
            const paddle::Tensor& up_quant, const paddle::Tensor& up_scales, const paddle::Tensor& up_columns,
            const paddle::Tensor& down_quant, const paddle::Tensor& down_scales, const paddle::Tensor& down_columns,
            bool up_integer, bool down_integer, std::string order) {
  const std::string op = "ccq_moe";
  const Weights up(op, "up_gate_", up_quant, up_scales, up_columns, up_integer);
  const Weights down(op, "down_", down_quant, down_scales, down_columns, down_integer);
  const ccq_moe_shape s = BlockShape(op, x, up, down, order);
  const int tokens = static_cast<int>(x.shape()[0]);
  expect(op, "topk_ids", ids, paddle::DataType::INT64, {tokens, -1});
  const int top_k = static_cast<int>(ids.shape()[1]);
  expect(op, "topk_weights", weights, paddle::DataType::FLOAT32, {tokens, top_k});
  auto out = paddle::empty({tokens, s.hidden}, x.dtype(), x.place());
  auto workspace = Workspace(ccq_moe_workspace(tokens, top_k, &s), x);
  check(op, ccq_moe(x.data(), ids.data<int64_t>(), weights.data<float>(), tokens, top_k, &s, &up.projection,
                    &down.projection, out.data(), workspace.data(), x.stream()));
  return {out};
}

// Scales have a row of 16 columns, in either layout.
std::vector<Shape> LinearShape(Shape x, Shape, Shape scales, Shape) { return {{x[0], scales[1] * 16}}; }
Types LinearType(paddle::DataType x, paddle::DataType, paddle::DataType, paddle::DataType) { return {x}; }

std::vector<Shape> MoeGemmShape(Shape x, Shape, Shape, Shape scales, Shape, const paddle::optional<Shape>&) {
  return {{x[0], scales[1] * 16}};
}
Types MoeGemmType(paddle::DataType x, paddle::DataType, paddle::DataType, paddle::DataType, paddle::DataType,
                  const paddle::optional<paddle::DataType>&) {
  return {x};
}

std::vector<Shape> FfnShape(Shape x, Shape, Shape, Shape, Shape, Shape, Shape, Shape) { return {x}; }
Types FfnType(paddle::DataType x, paddle::DataType, paddle::DataType, paddle::DataType, paddle::DataType,
              paddle::DataType, paddle::DataType, paddle::DataType) {
  return {x};
}

std::vector<Shape> MoeShape(Shape x, Shape, Shape, Shape, Shape, Shape, Shape, Shape, Shape) { return {x}; }
Types MoeType(paddle::DataType x, paddle::DataType, paddle::DataType, paddle::DataType, paddle::DataType,
              paddle::DataType, paddle::DataType, paddle::DataType, paddle::DataType) {
  return {x};
}

}  // namespace ccq_paddle

PD_BUILD_OP(ccq_linear)
    .Inputs({"x", "quant", "scales", "columns"})
    .Outputs({"out"})
    .Attrs({"integer_pairs: bool", "row_order: std::string"})
    .SetKernelFn(PD_KERNEL(ccq_paddle::Linear))
    .SetInferShapeFn(PD_INFER_SHAPE(ccq_paddle::LinearShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ccq_paddle::LinearType));

PD_BUILD_OP(ccq_moe_gemm)
    .Inputs({"x", "offsets", "quant", "scales", "columns", paddle::Optional("row_scale")})
    .Outputs({"out"})
    .Attrs({"integer_pairs: bool", "row_order: std::string"})
    .SetKernelFn(PD_KERNEL(ccq_paddle::MoeGemm))
    .SetInferShapeFn(PD_INFER_SHAPE(ccq_paddle::MoeGemmShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ccq_paddle::MoeGemmType));

PD_BUILD_OP(ccq_moe_ffn)
    .Inputs({"x", "offsets", "up_gate_quant", "up_gate_scales", "up_gate_columns", "down_quant", "down_scales",
             "down_columns"})
    .Outputs({"out"})
    .Attrs({"up_gate_integer: bool", "down_integer: bool", "row_order: std::string"})
    .SetKernelFn(PD_KERNEL(ccq_paddle::MoeFfn))
    .SetInferShapeFn(PD_INFER_SHAPE(ccq_paddle::FfnShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ccq_paddle::FfnType));

PD_BUILD_OP(ccq_moe)
    .Inputs({"x", "topk_ids", "topk_weights", "up_gate_quant", "up_gate_scales", "up_gate_columns", "down_quant",
             "down_scales", "down_columns"})
    .Outputs({"out"})
    .Attrs({"up_gate_integer: bool", "down_integer: bool", "row_order: std::string"})
    .SetKernelFn(PD_KERNEL(ccq_paddle::Moe))
    .SetInferShapeFn(PD_INFER_SHAPE(ccq_paddle::MoeShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ccq_paddle::MoeType));
