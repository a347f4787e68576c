// SPDX-License-Identifier: Apache-2.0
// When linear_w8_few.cuh serves a call, and its launch.
//
// Functions return false where the GPU or the shape calls for the other kernel; else the launch's error is in `error`.
#pragma once

#include <algorithm>

#include "linear_w8_few.cuh"

namespace ccq_w8 {

struct Device {
  int major = 0, shared = 0, processors = 0;  // shared memory that a block may ask for, in bytes

  cudaError_t ask() {
    int id = 0;
    cudaError_t error = cudaGetDevice(&id);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, id);
    return error;
  }
};

template <typename C>
bool launch_few(const ccq_linear_w8_args& a, cudaStream_t stream, cudaError_t* error) {
  Device device;
  if ((*error = device.ask()) != cudaSuccess) return true;
  const size_t shared = C::shared_bytes(a.k);
  if (device.major < 9 || shared > static_cast<size_t>(device.shared) || a.k > kFewMostK) return false;
  auto kernel = few<C>;
  *error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (*error == cudaSuccess)
    *error = ccq::launch_early(kernel, dim3(std::min(device.processors, a.n / 16)), C::kThreads, shared, stream, a);
  return true;
}

inline bool launch_few(const ccq_linear_w8_args& a, cudaStream_t stream, cudaError_t* error) {
  if (a.rows == 1) return launch_few<FewConfig<1, 3>>(a, stream, error);
  if (a.rows == 2) return launch_few<FewConfig<2, 3>>(a, stream, error);
  if (a.rows <= 4) return launch_few<FewConfig<4, 3>>(a, stream, error);
  return a.rows <= 8 && launch_few<FewConfig<8, 2>>(a, stream, error);
}

}  // namespace ccq_w8
