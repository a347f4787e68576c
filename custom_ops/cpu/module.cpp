// SPDX-License-Identifier: Apache-2.0
// The Python module paddle_ccq._core: argument checks and array plumbing around encode() and ldlq_encode().
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <memory>
#include <stdexcept>

#include "encode.h"
#include "ldlq.h"
#include "ops_module.h"
#include "trellis_ldlq.h"

namespace py = pybind11;

namespace {

using Array = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Weight = py::array_t<float, py::array::c_style>;

// Owns the packed arrays that a Codebook points into.
struct Book {
  std::vector<int32_t> c01, c23, bias;
  ccq::Codebook view;
};

// entries int32 [count, dims]: signed states.
std::unique_ptr<Book> make_book(const Array& entries, int index_bits, int fraction) {
  if (entries.ndim() != 2 || entries.shape(1) < 1 || entries.shape(1) > 4 ||
      entries.shape(0) < 1 || entries.shape(0) > (1 << index_bits))
    throw std::invalid_argument("a code book must be [count <= 2^index_bits, 1..4]");
  auto book = std::make_unique<Book>();
  const int count = static_cast<int>(entries.shape(0)), dims = static_cast<int>(entries.shape(1));
  for (int e = 0; e < count; ++e) {
    int32_t c[4] = {}, norm = 0;
    for (int d = 0; d < dims; ++d) {
      const int32_t v = entries.at(e, d);
      // Keeps the sum of four products below 2^30 (search.h).
      if ((v < 0 ? -v : v) << index_bits > 1 << 13)
        throw std::invalid_argument("a code book entry is too large for its index bits");
      c[d] = v * (1 << index_bits);
      norm += v * v;
    }
    auto pack = [](int32_t low, int32_t high) {
      return static_cast<int32_t>((static_cast<uint32_t>(low) & 0xFFFFu) |
                                  (static_cast<uint32_t>(high) << 16));
    };
    book->c01.push_back(pack(c[0], c[1]));
    book->c23.push_back(pack(c[2], c[3]));
    book->bias.push_back(-(norm * (1 << (fraction - 1))) * (1 << index_bits) + e);
  }
  book->view = {count, index_bits, book->c01.data(), book->c23.data(), book->bias.data()};
  return book;
}

py::dict encode(const Weight& weight, const std::vector<std::vector<Array>>& pairs,
                const std::vector<int>& index_bits, const py::dict& layout_in, const py::dict& recipe_in,
                int threads, const std::string& isa) {
  ccq::Layout layout;
  for (const py::handle item : layout_in["sets"].cast<py::list>()) {
    const auto s = item.cast<py::dict>();
    layout.sets.push_back({s["book"].cast<int>(), s["lanes"].cast<int>(), s["first"].cast<int>(),
                           s["stride"].cast<int>(), s["dims"].cast<int>(), s["word"].cast<int>(),
                           s["shift"].cast<int>()});
    const ccq::LaneSet& set = layout.sets.back();
    if (set.lanes < 1 || set.lanes > ccq::kLanes || set.dims < 1 || set.dims > 4 || set.first < 0 ||
        set.first + (set.lanes - 1) * set.stride + set.dims > ccq::kGroup || set.book < 0 ||
        set.book >= static_cast<int>(index_bits.size()))
      throw std::invalid_argument("a lane set leaves its group");
  }
  if (layout.sets.empty() || layout.sets.size() > 4) throw std::invalid_argument("1 to 4 lane sets");
  layout.words = layout_in["words"].cast<int>();
  layout.fraction = layout_in["fraction"].cast<int>();
  layout.state_min = layout_in["state_min"].cast<int>();
  layout.state_max = layout_in["state_max"].cast<int>();
  layout.remainder_shift = layout_in["remainder_shift"].cast<int>();
  layout.scale_max = layout_in["scale_max"].cast<int>();

  ccq::Recipe recipe;
  recipe.nominal = recipe_in["nominal"].cast<double>();
  recipe.kappas = recipe_in["kappas"].cast<std::vector<double>>();
  recipe.window_low = recipe_in["window_low"].cast<int>();
  recipe.window_high = recipe_in["window_high"].cast<int>();
  recipe.ratios = recipe_in["ratios"].cast<std::vector<double>>();
  recipe.refits = recipe_in["refits"].cast<int>();
  recipe.keep_pairs = recipe_in["keep_pairs"].cast<int>();
  if (recipe.ratios.size() > ccq::kMaxBatch) throw std::invalid_argument("at most 8 ratios");
  if (recipe.keep_pairs < 1 || threads < 1) throw std::invalid_argument("keep_pairs and threads >= 1");

  if (weight.ndim() != 2 || weight.shape(1) % ccq::kGroup || weight.shape(1) == 0)
    throw std::invalid_argument("weight must be float32 [N, K] with 64 | K");
  const ccq::Kernels* kernels = ccq::pick_kernels(isa.c_str());
  if (!kernels) throw std::invalid_argument("this processor or build has no instruction set " + isa);

  std::vector<std::unique_ptr<Book>> owned;
  ccq::PairBooks books;
  for (const auto& pair : pairs) {
    if (pair.size() != index_bits.size()) throw std::invalid_argument("one index width per book");
    books.emplace_back();
    for (size_t b = 0; b < pair.size(); ++b) {
      owned.push_back(make_book(pair[b], index_bits[b], layout.fraction));
      books.back().push_back(owned.back()->view);
    }
  }
  if (books.empty()) throw std::invalid_argument("no code books");

  const py::ssize_t n = weight.shape(0), k = weight.shape(1), groups = k / ccq::kGroup;
  py::array_t<uint16_t> words({n, groups, static_cast<py::ssize_t>(layout.words)});
  py::array_t<uint16_t> scales({n, groups});
  py::array_t<float> supers(n);
  py::array_t<int32_t> chosen(n);
  py::array_t<double> sums({n, static_cast<py::ssize_t>(3)});
  const ccq::Output out{words.mutable_data(), scales.mutable_data(), supers.mutable_data(),
                        chosen.mutable_data(), sums.mutable_data()};
  {
    py::gil_scoped_release release;
    ccq::encode(*kernels, layout, recipe, books, weight.data(), n, k, threads, out);
  }
  py::dict result;
  result["words"] = words;
  result["scales"] = scales;
  result["supers"] = supers;
  result["pairs"] = chosen;
  result["sums"] = sums;
  return result;
}

// A contiguous float32 array of exactly this shape, or an error that names it.
const float* checked(const Weight& array, std::initializer_list<py::ssize_t> shape, const char* name) {
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  py::ssize_t i = 0;
  for (const py::ssize_t size : shape) fits = fits && array.shape(i++) == size;
  if (!fits) throw std::invalid_argument(std::string(name) + " has the wrong shape");
  return array.data();
}

py::dict ldlq(const Weight& weight, const py::dict& metric_in, const Weight& books, const Weight& supers,
              const py::dict& recipe_in, int threads, const std::string& isa) {
  if (weight.ndim() != 2 || weight.shape(0) < 1 || weight.shape(1) < 1 || weight.shape(1) % ccq::kRows)
    throw std::invalid_argument("weight must be float32 [N, K] with 64 | K");
  const py::ssize_t n = weight.shape(0), k = weight.shape(1), blocks = k / ccq::kBlock;
  if (books.ndim() != 3 || books.shape(0) < 1 || supers.ndim() != 2 || supers.shape(0) < 1)
    throw std::invalid_argument("books must be [pairs, 4, 256] and supers [candidates, N]");
  const auto h = metric_in["h"].cast<Weight>(), feedback = metric_in["feedback"].cast<Weight>();
  const auto d_root = metric_in["d_root"].cast<Weight>(), h_root = metric_in["h_root"].cast<Weight>();
  const auto h_inverse = metric_in["h_inverse"].cast<Weight>();
  ccq::Metric metric;
  metric.k = k;
  metric.h = checked(h, {k, k}, "h");
  metric.feedback = checked(feedback, {k, k}, "feedback");
  metric.d_root = checked(d_root, {blocks, ccq::kBlock, ccq::kBlock}, "d_root");
  metric.h_root = checked(h_root, {blocks, ccq::kBlock, ccq::kBlock}, "h_root");
  metric.h_inverse = checked(h_inverse, {blocks, ccq::kBlock, ccq::kBlock}, "h_inverse");
  metric.nominal = recipe_in["nominal"].cast<float>();
  const float* book = checked(books, {books.shape(0), ccq::kBlock, ccq::kWords}, "books");
  const float* super_scales = checked(supers, {supers.shape(0), n}, "supers");

  ccq::LdlqRecipe recipe;
  recipe.low = recipe_in["window_low"].cast<int>();
  recipe.high = recipe_in["window_high"].cast<int>();
  recipe.keep_pairs = recipe_in["keep_pairs"].cast<int>();
  recipe.sweeps = recipe_in["sweeps"].cast<int>();
  const int tried = recipe.high - recipe.low + 1;
  if (tried < 1 || tried > ccq::kMaxScales) throw std::invalid_argument("1 to 8 local scales");
  if (recipe.keep_pairs < 1 || recipe.sweeps < 0 || threads < 1)
    throw std::invalid_argument("keep_pairs and threads >= 1, sweeps >= 0");
  const ccq::LdlqKernels* kernels = ccq::pick_ldlq(isa.c_str());
  if (!kernels) throw std::invalid_argument("this processor or build has no instruction set " + isa);

  py::array_t<uint16_t> words({n, blocks});
  py::array_t<uint16_t> scales({n, k / ccq::kRows});
  py::array_t<float> chosen_supers(n);
  py::array_t<int32_t> pairs(n);
  py::array_t<double> loss(n);
  const ccq::LdlqOutput out{words.mutable_data(), scales.mutable_data(), chosen_supers.mutable_data(),
                            pairs.mutable_data(), loss.mutable_data()};
  {
    py::gil_scoped_release release;
    ccq::ldlq_encode(*kernels, metric, recipe, book, static_cast<int>(books.shape(0)), super_scales,
                     static_cast<int>(supers.shape(0)), weight.data(), n, threads, out);
  }
  py::dict result;
  result["words"] = words;
  result["scales"] = scales;
  result["supers"] = chosen_supers;
  result["pairs"] = pairs;
  result["loss"] = loss;
  return result;
}

py::dict trellis(const Weight& weight, const py::dict& recipe_in, int threads, const std::string& isa) {
  if (weight.ndim() != 2 || weight.shape(1) % ccq::kGroup || weight.shape(1) == 0)
    throw std::invalid_argument("weight must be float32 [N, K] with 64 | K");
  ccq::TrellisRecipe recipe;
  recipe.nominal = recipe_in["nominal"].cast<double>();
  recipe.kappas = recipe_in["kappas"].cast<std::vector<double>>();
  recipe.window_low = recipe_in["window_low"].cast<int>();
  recipe.window_high = recipe_in["window_high"].cast<int>();
  recipe.beam = recipe_in["beam"].cast<int>();
  if (recipe.beam < 0 || recipe.beam >= 1 << 22) throw std::invalid_argument("beam must be 0 to 2^22 - 1");
  if (recipe.window_low > 0 || recipe.window_high < 0 || threads < 1)
    throw std::invalid_argument("the window must hold 0, and threads >= 1");
  const ccq::TrellisKernels* kernels = ccq::pick_trellis(isa.c_str());
  if (!kernels) throw std::invalid_argument("this processor or build has no instruction set " + isa);
  const py::ssize_t n = weight.shape(0), k = weight.shape(1), groups = k / ccq::kGroup;
  py::array_t<uint8_t> words({n, groups, static_cast<py::ssize_t>(ccq::kTrellisBytes)});
  py::array_t<uint8_t> scales({n, groups});
  py::array_t<float> supers(n);
  py::array_t<double> sums({n, static_cast<py::ssize_t>(3)});
  const ccq::TrellisOutput out{words.mutable_data(), scales.mutable_data(), supers.mutable_data(),
                               sums.mutable_data()};
  {
    py::gil_scoped_release release;
    ccq::trellis_encode(*kernels, recipe, weight.data(), n, k, threads, out);
  }
  py::dict result;
  result["words"] = words;
  result["scales"] = scales;
  result["supers"] = supers;
  result["sums"] = sums;
  return result;
}

py::dict trellis_ldlq(const Weight& weight, const py::dict& metric, const Weight& supers, const py::dict& recipe_in,
                      int threads, const std::string& isa) {
  if (weight.ndim() != 2 || weight.shape(0) < 1 || weight.shape(1) < 1 || weight.shape(1) % ccq::kGroup)
    throw std::invalid_argument("weight must be float32 [N, K] with 64 | K");
  const py::ssize_t n = weight.shape(0), k = weight.shape(1), groups = k / ccq::kGroup, blocks = k / 4;
  const py::ssize_t w = ccq::kWindowRows, b = ccq::kWindowBlocks;
  if (supers.ndim() != 2 || supers.shape(0) < 1 || supers.shape(1) != n)
    throw std::invalid_argument("supers must be [candidates, N]");
  std::vector<Weight> kept;
  auto part = [&](const char* name, std::initializer_list<py::ssize_t> shape) {
    kept.push_back(metric[name].cast<Weight>());
    return checked(kept.back(), shape, name);
  };
  ccq::TrellisHessian h;
  h.k = k;
  h.h = part("h", {k, k});
  h.all = {part("m", {k, k}), part("root", {blocks, 4, 4}), part("unit", {blocks}), part("ratio", {blocks}),
           part("spread", {blocks})};
  h.windows = {part("window_m", {groups, w, w}), part("window_root", {groups, b, 4, 4}),
               part("window_unit", {groups, b}), part("window_ratio", {groups, b}),
               part("window_spread", {groups, b})};
  h.inverse = part("window_inverse", {groups, w, w});

  ccq::TrellisLdlqRecipe recipe;
  recipe.nominal = recipe_in["nominal"].cast<double>();
  recipe.window_low = recipe_in["window_low"].cast<int>();
  recipe.window_high = recipe_in["window_high"].cast<int>();
  recipe.beam = recipe_in["beam"].cast<int>();
  recipe.sweeps = recipe_in["sweeps"].cast<int>();
  if (recipe.beam < 0 || recipe.beam >= 1 << 22) throw std::invalid_argument("beam must be 0 to 2^22 - 1");
  if (recipe.window_low > 0 || recipe.window_high < 0 || recipe.sweeps < 0 || threads < 1)
    throw std::invalid_argument("the window must hold 0, sweeps >= 0 and threads >= 1");
  const ccq::TrellisKernels* kernels = ccq::pick_trellis(isa.c_str());
  if (!kernels) throw std::invalid_argument("this processor or build has no instruction set " + isa);

  py::array_t<uint8_t> words({n, groups, static_cast<py::ssize_t>(ccq::kTrellisBytes)});
  py::array_t<uint8_t> scales({n, groups});
  py::array_t<float> chosen(n);
  py::array_t<double> loss(n);
  const ccq::TrellisLdlqOutput out{words.mutable_data(), scales.mutable_data(), chosen.mutable_data(),
                                   loss.mutable_data()};
  {
    py::gil_scoped_release release;
    ccq::trellis_ldlq_encode(*kernels, h, recipe, supers.data(), static_cast<int>(supers.shape(0)), weight.data(), n,
                             threads, out);
  }
  py::dict result;
  result["words"] = words;
  result["scales"] = scales;
  result["supers"] = chosen;
  result["loss"] = loss;
  return result;
}

std::vector<std::string> ldlq_instruction_sets() {
  std::vector<std::string> names;
  for (const char* name : {"avx512", "avx2", "plain"})
    if (ccq::pick_ldlq(name)) names.emplace_back(name);
  return names;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* name : {"avx512vnni", "avx512", "avx2", "plain"})
    if (ccq::pick_kernels(name)) names.emplace_back(name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled core of paddle_ccq: the code search, data-free and calibrated.";
  m.def("encode", &encode, py::arg("weight"), py::arg("pairs"), py::arg("index_bits"), py::arg("layout"),
        py::arg("recipe"), py::arg("threads"), py::arg("isa") = "auto");
  m.def("ldlq", &ldlq, py::arg("weight"), py::arg("metric"), py::arg("books"), py::arg("supers"),
        py::arg("recipe"), py::arg("threads"), py::arg("isa") = "auto");
  m.def("trellis", &trellis, py::arg("weight"), py::arg("recipe"), py::arg("threads"), py::arg("isa") = "auto");
  m.def("trellis_ldlq", &trellis_ldlq, py::arg("weight"), py::arg("metric"), py::arg("supers"), py::arg("recipe"),
        py::arg("threads"), py::arg("isa") = "auto");
  m.def("ldlq_instruction_sets", &ldlq_instruction_sets, "Usable builds of ldlq, fastest first.");
  m.def("instruction_sets", &instruction_sets, "Usable builds of the score loop, fastest first.");
  ccq::bind_ops(m);
  ccq::bind_floats(m);
}
