// SPDX-License-Identifier: Apache-2.0
// The Python module paddle_ccq._core: argument checks and array plumbing around encode().
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>

#include "encode.h"
#include "ops_module.h"

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

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* name : {"avx512vnni", "avx512", "avx2", "plain"})
    if (ccq::pick_kernels(name)) names.emplace_back(name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled core of paddle_ccq: the data-free code search.";
  m.def("encode", &encode, py::arg("weight"), py::arg("pairs"), py::arg("index_bits"), py::arg("layout"),
        py::arg("recipe"), py::arg("threads"), py::arg("isa") = "auto");
  m.def("instruction_sets", &instruction_sets, "Usable builds of the score loop, fastest first.");
  ccq::bind_ops(m);
}
