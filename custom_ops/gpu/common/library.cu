// SPDX-License-Identifier: Apache-2.0
// The version of the library's C interface. Raise it with every change that an older or newer Python side would misread;
// paddle_ccq/ops/gpu_abi.py has the same number.

extern "C" int ccq_library_version() { return 2; }
