// SPDX-License-Identifier: Apache-2.0
#include "moe_block.h"

#include <algorithm>

#include "../common/arena.h"
#include "activation.h"
#include "dispatch.h"

namespace {

bool valid(const ccq_moe_shape* s) { return s->width > 0 && s->width % 128 == 0 && s->hidden > 0 && s->hidden % 128 == 0; }

int64_t gemm_workspace(int rows, const ccq_moe_shape* s) {
  return static_cast<int64_t>(std::max(ccq_moe_gemm_workspace(rows, s->hidden, 2 * s->width, s->experts),
                                       ccq_moe_gemm_workspace(rows, s->width, s->hidden, s->experts)));
}

// Arrays of ccq_moe_ffn: activations are 16 bits wide.
struct FfnMemory {
  void* products;    // the workspace of either product
  uint16_t* both;    // [rows, 2 * width], gate and up
  uint16_t* middle;  // [rows, width]

  FfnMemory(ccq::Arena& arena, int rows, const ccq_moe_shape* s)
      : products(arena.take<char>(gemm_workspace(rows, s))), both(arena.take<uint16_t>(int64_t{2} * rows * s->width)),
        middle(arena.take<uint16_t>(int64_t{rows} * s->width)) {}
};

// Arrays of ccq_moe.
struct BlockMemory {
  char* ffn;         // the workspace of ccq_moe_ffn
  int64_t* offsets;  // [experts]
  int32_t* place;    // [rows]
  uint16_t* sorted;  // [rows, hidden]
  uint16_t* result;  // [rows, hidden]

  BlockMemory(ccq::Arena& arena, int rows, const ccq_moe_shape* s)
      : ffn(arena.take<char>(static_cast<int64_t>(ccq_moe_ffn_workspace(rows, s)))),
        offsets(arena.take<int64_t>(s->experts)), place(arena.take<int32_t>(rows)),
        sorted(arena.take<uint16_t>(int64_t{rows} * s->hidden)), result(arena.take<uint16_t>(int64_t{rows} * s->hidden)) {}
};

cudaError_t gemm(const void* x, const int64_t* offsets, const ccq_moe_projection* w, int rows, int k, int n,
                 const ccq_moe_shape* s, void* out, void* workspace, cudaStream_t stream) {
  ccq_moe_gemm_args a{};
  a.x = x, a.offsets = offsets, a.quant = w->quant, a.scales = w->scales, a.columns = w->columns;
  a.out = out, a.workspace = workspace;
  a.rows = rows, a.k = k, a.n = n, a.experts = s->experts;
  a.dtype = s->dtype, a.pairs = w->pairs, a.row_order = s->row_order;
  return ccq_moe_gemm(&a, stream);
}

}  // namespace

extern "C" size_t ccq_moe_ffn_workspace(int rows, const ccq_moe_shape* s) {
  ccq::Arena arena(nullptr);
  FfnMemory(arena, rows, s);
  return arena.most();
}

extern "C" cudaError_t ccq_moe_ffn(const void* x, const int64_t* offsets, int rows, const ccq_moe_shape* s,
                                   const ccq_moe_projection* up_gate, const ccq_moe_projection* down, void* out,
                                   void* workspace, cudaStream_t stream) {
  if (!valid(s)) return cudaErrorInvalidValue;
  ccq::Arena arena(workspace);
  const FfnMemory m(arena, rows, s);
  cudaError_t error = gemm(x, offsets, up_gate, rows, s->hidden, 2 * s->width, s, m.both, m.products, stream);
  if (error == cudaSuccess) error = ccq_swiglu(m.both, m.middle, rows, s->width, s->dtype, stream);
  if (error == cudaSuccess) error = gemm(m.middle, offsets, down, rows, s->width, s->hidden, s, out, m.products, stream);
  return error;
}

extern "C" size_t ccq_moe_workspace(int tokens, int top_k, const ccq_moe_shape* s) {
  if (tokens < 0 || top_k < 1 || tokens > 2147483647 / top_k) return 0;
  ccq::Arena arena(nullptr);
  BlockMemory(arena, tokens * top_k, s);
  return arena.most();
}

extern "C" cudaError_t ccq_moe(const void* x, const int64_t* ids, const float* weights, int tokens, int top_k,
                               const ccq_moe_shape* s, const ccq_moe_projection* up_gate,
                               const ccq_moe_projection* down, void* out, void* workspace, cudaStream_t stream) {
  if (!valid(s) || tokens < 0 || top_k < 1 || tokens > 2147483647 / top_k) return cudaErrorInvalidValue;
  const int rows = tokens * top_k;
  ccq::Arena arena(workspace);
  const BlockMemory m(arena, rows, s);
  cudaError_t error = ccq_moe_dispatch(ids, x, tokens, top_k, s->experts, s->hidden, m.offsets, m.place, m.sorted, stream);
  if (error == cudaSuccess) error = ccq_moe_ffn(m.sorted, m.offsets, rows, s, up_gate, down, m.result, m.ffn, stream);
  if (error == cudaSuccess)
    error = ccq_moe_combine(m.result, m.place, weights, tokens, top_k, s->hidden, s->dtype, out, stream);
  return error;
}
