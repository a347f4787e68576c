// SPDX-License-Identifier: Apache-2.0
// The CPU ops in paddle_ccq._core. paddle_ccq/ops checks the arguments and names the wrong one; the
// checks here only keep a careless direct call from leaving an array.
#include "ops_module.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "dequant.h"
#include "matmul.h"

namespace py = pybind11;

namespace ccq {
namespace {

using Floats = py::array_t<float, py::array::c_style>;

Format format_named(const std::string& name) {
  for (Format f : {Format::kWint2, Format::kCcq25, Format::kCcq275, Format::kCcq2t})
    if (name == info(f).name) return f;
  throw std::invalid_argument("format: unknown name " + name);
}

void need(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

const float* vector_of(const Floats& a, int64_t n, const char* what) {
  need(a.ndim() == 1 && a.shape(0) == n, what);
  return a.data();
}

Stored stored(const std::string& format, const py::array& words, const py::array& scales,
              const Floats& super, const Floats& code_scale, const Floats& code_zp) {
  Stored t{};
  t.format = format_named(format);
  const FormatInfo& f = info(t.format);
  need(words.ndim() == 2 && words.itemsize() == f.word_bytes && words.shape(0) % f.words == 0 &&
           (words.flags() & py::array::c_style),
       "quant_weight: wrong shape, type or order");
  t.k = words.shape(0) / f.words * kRows;
  t.n = words.shape(1);
  t.words = static_cast<const uint8_t*>(words.data());
  t.super = vector_of(super, t.n, "super_scales: wrong shape");
  if (has_scales(t.format)) {
    need(t.k % 128 == 0 && scales.ndim() == 2 && scales.itemsize() == 1 && scales.shape(0) == t.k / 128 &&
             scales.shape(1) == t.n && (scales.flags() & py::array::c_style),
         "weight_scale: wrong shape, type or order");
    t.scales = static_cast<const uint8_t*>(scales.data());
  }
  if (t.format == Format::kWint2) {
    t.code_scale = vector_of(code_scale, t.n, "code_scale: wrong shape");
    t.code_zp = vector_of(code_zp, t.n, "code_zp: wrong shape");
  }
  return t;
}

py::array dequantize_array(const std::string& format, const py::array& words, const py::array& scales,
                           const Floats& super, const Floats& code_scale, const Floats& code_zp,
                           const std::string& runtime, int threads) {
  const Stored t = stored(format, words, scales, super, code_scale, code_zp);
  need(runtime == "float32" || runtime == "bfloat16" || runtime == "float16", "dtype: unknown");
  const Runtime r = runtime == "float32" ? Runtime::kFloat32
                                         : runtime == "bfloat16" ? Runtime::kBfloat16 : Runtime::kFloat16;
  py::array out = r == Runtime::kFloat32 ? py::array(py::array_t<float>({t.k, t.n}))
                                         : py::array(py::array_t<uint16_t>({t.k, t.n}));
  void* data = out.mutable_data();
  py::gil_scoped_release release;
  dequantize(t, r, data, threads);
  return out;
}

std::shared_ptr<Packed> repack_arrays(const std::string& format, const py::array& words,
                                      const py::array& scales, const Floats& super,
                                      const Floats& code_scale, const Floats& code_zp, const py::array& before) {
  Stored t = stored(format, words, scales, super, code_scale, code_zp);
  need(t.n % kColumns == 0, "quant_weight: N must be a multiple of 16");
  if (before.size()) {
    need(t.format == Format::kCcq2t && before.ndim() == 1 && before.itemsize() == 1 && before.shape(0) == t.n &&
             (before.flags() & py::array::c_style),
         "before: wrong shape, type or format");
    t.before = static_cast<const uint8_t*>(before.data());
  }
  auto packed = std::make_shared<Packed>(t.format, t.k, t.n);
  py::gil_scoped_release release;
  repack(t, *packed);
  return packed;
}

py::tuple unpack_arrays(const Packed& w) {
  const FormatInfo& f = info(w.format);
  py::array words = f.word_bytes == 1 ? py::array(py::array_t<uint8_t>({w.groups() * f.words, w.n}))
                                      : py::array(py::array_t<uint16_t>({w.groups() * f.words, w.n}));
  py::array_t<uint8_t> scales({has_scales(w.format) ? w.k / 128 : int64_t{0}, w.n});
  unpack(w, static_cast<uint8_t*>(words.mutable_data()), scales.mutable_data());
  auto floats = [](const std::vector<float>& v) { return Floats(static_cast<py::ssize_t>(v.size()), v.data()); };
  return py::make_tuple(words, scales, floats(w.super), floats(w.code_scale), floats(w.code_zp));
}

Floats multiply_arrays(const Floats& x, const std::vector<std::shared_ptr<Packed>>& matrices,
                       const std::vector<int64_t>& ends, const std::vector<int>& order, bool fine,
                       int threads, const std::string& isa) {
  need(!matrices.empty() && ends.size() == matrices.size(), "offsets: one for each matrix");
  std::vector<const Packed*> pointers;
  for (const auto& m : matrices) {
    need(m->k == matrices[0]->k && m->n == matrices[0]->n, "matrices: all of one shape");
    pointers.push_back(m.get());
  }
  const Packed& shape = *pointers[0];
  need(x.ndim() == 2 && x.shape(1) == shape.k, "x: wrong shape");
  for (size_t e = 0; e < ends.size(); ++e) need(ends[e] >= (e ? ends[e - 1] : 0), "offsets: must not fall");
  need(ends.back() == x.shape(0), "offsets: must end at the rows of x");
  need(order.size() == kRows, "row order: 64 entries");
  for (int row : order) need(row >= 0 && row < kRows, "row order: 0..63");
  const MatmulKernels* kernels = pick_matmul(isa.c_str());
  need(kernels != nullptr, "this processor or build has no such instruction set");
  Floats y({x.shape(0), static_cast<py::ssize_t>(shape.n)});
  float* out = y.mutable_data();
  py::gil_scoped_release release;
  if (ends.back() > 0) multiply(*kernels, pointers, ends.data(), x.data(), order.data(), fine, out, threads);
  return y;
}

Floats swiglu_array(const Floats& x, int threads) {
  need(x.ndim() == 2 && x.shape(1) % 2 == 0, "x: [rows, 2 * width]");
  Floats y({x.shape(0), x.shape(1) / 2});
  float* out = y.mutable_data();
  py::gil_scoped_release release;
  swiglu(x.data(), x.shape(0), x.shape(1) / 2, out, threads);
  return y;
}

std::vector<std::string> matmul_sets() {
  std::vector<std::string> names;
  for (const char* name : {"avx512vnni", "avx512", "avx2", "plain"})
    if (pick_matmul(name)) names.emplace_back(name);
  return names;
}

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<Packed, std::shared_ptr<Packed>>(m, "Packed", "A matrix in the layout the CPU ops stream.")
      .def_readonly("k", &Packed::k)
      .def_readonly("n", &Packed::n)
      .def_readonly("integer", &Packed::integer)
      .def_property_readonly("before", [](const Packed& w) {
        return py::array_t<uint8_t>(static_cast<py::ssize_t>(w.before.size()), w.before.data());
      })
      .def_property_readonly("format", [](const Packed& w) { return info(w.format).name; })
      .def_property_readonly("nbytes", [](const Packed& w) {
        return w.words.size() + w.scales.size() +
               4 * (w.super.size() + w.code_scale.size() + w.code_zp.size()) + w.before.size();
      })
      .def("unpack", &unpack_arrays);
  m.def("repack", &repack_arrays, py::arg("format"), py::arg("words"), py::arg("scales"), py::arg("super"),
        py::arg("code_scale"), py::arg("code_zp"), py::arg("before") = py::array_t<uint8_t>(0));
  m.def("dequantize", &dequantize_array, py::arg("format"), py::arg("words"), py::arg("scales"),
        py::arg("super"), py::arg("code_scale"), py::arg("code_zp"), py::arg("runtime"), py::arg("threads"));
  m.def("multiply", &multiply_arrays, py::arg("x"), py::arg("matrices"), py::arg("ends"), py::arg("order"),
        py::arg("fine"), py::arg("threads"), py::arg("isa") = "auto");
  m.def("swiglu", &swiglu_array, py::arg("x"), py::arg("threads"));
  m.def("matmul_instruction_sets", &matmul_sets, "Usable builds of the matrix product, fastest first.");
}

}  // namespace ccq
