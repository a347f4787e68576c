// SPDX-License-Identifier: Apache-2.0
// Dense products and attention in paddle_ccq._core; paddle_ccq/ops checks what users pass.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>

#include "floats.h"
#include "ops_module.h"

namespace py = pybind11;

namespace ccq {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<int8_t, py::array::c_style>;
using Integers = py::array_t<int64_t, py::array::c_style>;

void need(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

const FloatKernels& kernels_named(const std::string& isa) {
  const FloatKernels* kernels = pick_floats(isa.c_str());
  need(kernels != nullptr, "this processor or build has no such instruction set");
  return *kernels;
}

// weight float32 [k, n]; kept in bfloat16 where that loses nothing.
std::shared_ptr<Dense> pack_floats(const Floats& weight) {
  need(weight.ndim() == 2 && weight.shape(0) > 0 && weight.shape(1) > 0, "weight: [k, n]");
  const int64_t k = weight.shape(0), n = weight.shape(1);
  const float* from = weight.data();
  py::gil_scoped_release release;
  uint32_t low = 0;
  for (int64_t i = 0; i < k * n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    low |= bits & 0xFFFFu;
  }
  auto w = std::make_shared<Dense>(low ? Store::kFloat32 : Store::kBfloat16, k, n);
  for (int64_t b = 0; b < w->blocks(); ++b) {
    const int64_t column = b * kBlockColumns, width = std::min<int64_t>(kBlockColumns, n - column);
    const size_t step = w->row_bytes(w->vectors(b));
    uint8_t* to = w->block(b);
    for (int64_t i = 0; i < k; ++i, to += step)
      for (int64_t c = 0; c < width; ++c) {
        uint32_t bits;
        std::memcpy(&bits, from + i * n + column + c, 4);
        if (low) {
          std::memcpy(to + 4 * c, &bits, 4);
        } else {
          const uint16_t high = static_cast<uint16_t>(bits >> 16);
          std::memcpy(to + 2 * c, &high, 2);
        }
      }
  }
  return w;
}

// states int8 [k, n] of `bits` bits, scales [n]
std::shared_ptr<Dense> pack_integers(const Bytes& states, const Floats& scales, int bits) {
  need(bits == 8 || bits == 4, "bits: 8 or 4");
  need(states.ndim() == 2 && states.shape(0) > 0 && states.shape(1) > 0, "states: [k, n]");
  const int64_t k = states.shape(0), n = states.shape(1);
  need(scales.ndim() == 1 && scales.shape(0) == n, "scales: [n]");
  const int8_t* from = states.data();
  auto w = std::make_shared<Dense>(bits == 8 ? Store::kInt8 : Store::kInt4, k, n);
  std::copy_n(scales.data(), n, w->scale.begin());
  py::gil_scoped_release release;
  for (int64_t b = 0; b < w->blocks(); ++b) {
    const int64_t column = b * kBlockColumns, width = std::min<int64_t>(kBlockColumns, n - column);
    const size_t step = w->row_bytes(w->vectors(b));
    uint8_t* block = w->block(b);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t c = 0; c < width; ++c) {
        const int8_t state = from[i * n + column + c];
        if (bits == 8)
          block[i * step + c] = static_cast<uint8_t>(state);
        else
          block[i / 2 * step + c] |= static_cast<uint8_t>(((state + 8) & 15) << (i % 2 ? 4 : 0));
      }
  }
  return w;
}

Floats multiply_array(const Floats& x, const Dense& w, int threads, const std::string& isa) {
  need(x.ndim() == 2 && x.shape(1) == w.k, "x: [rows, k]");
  const FloatKernels& kernels = kernels_named(isa);
  Floats y({x.shape(0), static_cast<py::ssize_t>(w.n)});
  float* out = y.mutable_data();
  const int64_t rows = x.shape(0);
  py::gil_scoped_release release;
  if (rows) multiply_dense(kernels, w, x.data(), rows, out, threads);
  return y;
}

Floats columns_array(const Dense& w, const Integers& columns) {
  need(columns.ndim() == 1, "columns: one dimension");
  need(w.scale.empty(), "columns: of floats only");
  const int64_t* wanted = columns.data();
  for (py::ssize_t i = 0; i < columns.shape(0); ++i) need(wanted[i] >= 0 && wanted[i] < w.n, "columns: 0 to n-1");
  Floats out({columns.shape(0), static_cast<py::ssize_t>(w.k)});
  gather_columns(w, wanted, columns.shape(0), out.mutable_data());
  return out;
}

Floats attend_arrays(const Floats& qkv, const Floats& cosines, const Floats& sines, const Integers& pieces,
                     py::array_t<float> keys, py::array_t<float> values, int64_t heads, int threads,
                     const std::string& isa) {
  need(keys.ndim() == 4 && (keys.flags() & py::array::c_style) && keys.shape(3) == kFloatLanes,
       "keys: [heads, places / 16, dim, 16]");
  const int64_t key_heads = keys.shape(0), places = keys.shape(1) * kFloatLanes, dim = keys.shape(2);
  const int64_t padded = (dim + kFloatLanes - 1) / kFloatLanes * kFloatLanes;
  need(values.ndim() == 3 && (values.flags() & py::array::c_style) && values.shape(0) == key_heads &&
           values.shape(1) == places && values.shape(2) == padded,
       "values: [heads, places, dim rounded up to 16]");
  need(dim % 2 == 0 && heads > 0 && heads % key_heads == 0, "heads: not a multiple of the key heads");
  need(qkv.ndim() == 2 && qkv.shape(1) == (heads + 2 * key_heads) * dim, "qkv: wrong width");
  const int64_t tokens = qkv.shape(0);
  for (const Floats* a : {&cosines, &sines})
    need(a->ndim() == 2 && a->shape(0) == tokens && a->shape(1) == dim / 2, "cosines, sines: [tokens, dim / 2]");
  need(pieces.ndim() == 2 && pieces.shape(1) == 3, "pieces: [pieces, 3]");
  std::vector<Piece> found;
  int64_t first = 0;
  for (py::ssize_t i = 0; i < pieces.shape(0); ++i) {
    const Piece piece{first, pieces.at(i, 0), pieces.at(i, 1), pieces.at(i, 2)};
    need(piece.count > 0 && piece.start >= 0 && piece.base >= 0 && piece.base % kFloatLanes == 0 &&
             piece.count <= tokens - first && piece.base + piece.start + piece.count <= places,
         "pieces: outside of the cache");
    found.push_back(piece);
    first += piece.count;
  }
  need(first == tokens, "pieces: must cover the tokens");
  const FloatKernels& kernels = kernels_named(isa);
  Floats y({static_cast<py::ssize_t>(tokens), static_cast<py::ssize_t>(heads * dim)});
  float *out = y.mutable_data(), *k = keys.mutable_data(), *v = values.mutable_data();
  py::gil_scoped_release release;
  attend(kernels, {heads, key_heads, dim, padded}, found, qkv.data(), tokens, cosines.data(), sines.data(), k, v,
         places, out, threads);
  return y;
}

std::vector<std::string> float_sets() {
  std::vector<std::string> names;
  for (const char* name : {"avx512", "avx2", "plain"})
    if (pick_floats(name)) names.emplace_back(name);
  return names;
}

}  // namespace

void bind_floats(py::module_& m) {
  py::class_<Dense, std::shared_ptr<Dense>>(m, "Dense", "A dense matrix in the layout its product streams.")
      .def_readonly("k", &Dense::k)
      .def_readonly("n", &Dense::n)
      .def_property_readonly("store",
                             [](const Dense& w) {
                               const char* names[] = {"float32", "bfloat16", "int8", "int4"};
                               return names[static_cast<int>(w.store)];
                             })
      .def_property_readonly("nbytes", [](const Dense& w) { return w.data.size() + 4 * w.scale.size(); });
  m.def("pack_floats", &pack_floats, py::arg("weight"));
  m.def("pack_integers", &pack_integers, py::arg("states"), py::arg("scales"), py::arg("bits"));
  m.def("multiply_dense", &multiply_array, py::arg("x"), py::arg("weight"), py::arg("threads"),
        py::arg("isa") = "auto");
  m.def("dense_columns", &columns_array, py::arg("weight"), py::arg("columns"));
  // noconvert: a copy of the cache would take the new keys with it.
  m.def("attend", &attend_arrays, py::arg("qkv"), py::arg("cosines"), py::arg("sines"), py::arg("pieces"),
        py::arg("keys").noconvert(), py::arg("values").noconvert(), py::arg("heads"), py::arg("threads"),
        py::arg("isa") = "auto");
  m.def("float_instruction_sets", &float_sets, "Usable builds of the float products, fastest first.");
}

}  // namespace ccq
