// SPDX-License-Identifier: Apache-2.0
#include "moe_block.h"

#include <algorithm>

#include "activation.h"
#include "dispatch.h"

namespace {

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

bool valid(const ccq_moe_shape* s) { return s->width > 0 && s->width % 128 == 0 && s->hidden > 0 && s->hidden % 128 == 0; }

size_t gemm_workspace(int rows, const ccq_moe_shape* s) {
  return rounded(std::max(ccq_moe_gemm_workspace(rows, s->hidden, 2 * s->width, s->experts),
                          ccq_moe_gemm_workspace(rows, s->width, s->hidden, s->experts)));
}

// Hands out a workspace piece by piece.
struct Pieces {
  char* next;
  template <typename T>
  T* take(size_t bytes) {
    char* p = next;
    next += rounded(bytes);
    return reinterpret_cast<T*>(p);
  }
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
  return gemm_workspace(rows, s) + rounded(size_t{4} * rows * s->width) + rounded(size_t{2} * rows * s->width);
}

extern "C" cudaError_t ccq_moe_ffn(const void* x, const int64_t* offsets, int rows, const ccq_moe_shape* s,
                                   const ccq_moe_projection* up_gate, const ccq_moe_projection* down, void* out,
                                   void* workspace, cudaStream_t stream) {
  if (!valid(s)) return cudaErrorInvalidValue;
  Pieces pieces{static_cast<char*>(workspace)};
  void* scratch = pieces.take<void>(gemm_workspace(rows, s));
  void* both = pieces.take<void>(size_t{4} * rows * s->width);
  void* middle = pieces.take<void>(size_t{2} * rows * s->width);
  cudaError_t error = gemm(x, offsets, up_gate, rows, s->hidden, 2 * s->width, s, both, scratch, stream);
  if (error == cudaSuccess) error = ccq_swiglu(both, middle, rows, s->width, s->dtype, stream);
  if (error == cudaSuccess) error = gemm(middle, offsets, down, rows, s->width, s->hidden, s, out, scratch, stream);
  return error;
}

extern "C" size_t ccq_moe_workspace(int tokens, int top_k, const ccq_moe_shape* s) {
  const size_t rows = static_cast<size_t>(tokens) * top_k;
  return ccq_moe_ffn_workspace(static_cast<int>(rows), s) + rounded(8 * s->experts) + rounded(4 * rows) +
         2 * rounded(2 * rows * s->hidden);
}

extern "C" cudaError_t ccq_moe(const void* x, const int64_t* ids, const float* weights, int tokens, int top_k,
                               const ccq_moe_shape* s, const ccq_moe_projection* up_gate,
                               const ccq_moe_projection* down, void* out, void* workspace, cudaStream_t stream) {
  if (!valid(s) || tokens < 0 || top_k < 1 || tokens > 2147483647 / top_k) return cudaErrorInvalidValue;
  const int rows = tokens * top_k;
  Pieces pieces{static_cast<char*>(workspace)};
  void* scratch = pieces.take<void>(ccq_moe_ffn_workspace(rows, s));
  auto* offsets = pieces.take<int64_t>(8 * s->experts);
  auto* place = pieces.take<int32_t>(size_t{4} * rows);
  void* sorted = pieces.take<void>(size_t{2} * rows * s->hidden);
  void* result = pieces.take<void>(size_t{2} * rows * s->hidden);
  cudaError_t error = ccq_moe_dispatch(ids, x, tokens, top_k, s->experts, s->hidden, offsets, place, sorted, stream);
  if (error == cudaSuccess) error = ccq_moe_ffn(sorted, offsets, rows, s, up_gate, down, result, scratch, stream);
  if (error == cudaSuccess)
    error = ccq_moe_combine(result, place, weights, tokens, top_k, s->hidden, s->dtype, out, stream);
  return error;
}
