// SPDX-License-Identifier: Apache-2.0
// Registers the CPU ops with the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace ccq {
void bind_ops(pybind11::module_& m);
void bind_floats(pybind11::module_& m);  // dense products and attention
}  // namespace ccq
