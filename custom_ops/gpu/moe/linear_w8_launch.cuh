// SPDX-License-Identifier: Apache-2.0
// Which of the kernels that multiply bytes by integers serves a call, and its launch.
//
// Each function returns false where the GPU or the shape calls for another kernel; else the launch's error is in `error`.
#pragma once

#include <algorithm>

#include "linear_w8_few.cuh"
#ifdef CCQ_SM90A
#include "linear_w8_many.cuh"
#endif

#ifndef CCQ_W8_MANY_ROWS  // rows up to which clusters serve
#define CCQ_W8_MANY_ROWS 8
#endif

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

#ifdef CCQ_SM90A
template <typename C>
bool launch_many(const ccq_linear_w8_args& a, cudaStream_t stream, cudaError_t* error) {
  const size_t shared = C::shared_bytes(a.k);
  if (a.k % (64 * C::kC)) return false;
  auto kernel = many<C>;
  *error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (*error != cudaSuccess) return true;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = C::kC, attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(C::kC), config.blockDim = dim3(C::kThreads), config.dynamicSmemBytes = shared;
  config.stream = stream, config.attrs = attributes, config.numAttrs = 1;
  int most = 0;
  *error = cudaOccupancyMaxActiveClusters(&most, kernel, &config);
  if (*error != cudaSuccess) return true;
  if (most < 1) return false;
  // No cluster has more tiles than needs be, and no more clusters than are needed for that.
  const int tiles = a.n / 64, each = (tiles + most - 1) / most, clusters = (tiles + each - 1) / each;
  config.gridDim = dim3(C::kC * clusters), config.numAttrs = 2;
  *error = cudaLaunchKernelEx(&config, kernel, a, clusters);
  return true;
}

template <int kRows>
bool launch_many(const ccq_linear_w8_args& a, cudaStream_t stream, cudaError_t* error) {
  // Blocks of a cluster: as few as keep the activations in 128 KiB of shared memory each.
  const int64_t bytes = int64_t{2} * kRows * a.k, most = 128 << 10;
  if (bytes <= most) return launch_many<ManyConfig<kRows, 1>>(a, stream, error);
  if (bytes <= 2 * most) return launch_many<ManyConfig<kRows, 2>>(a, stream, error);
  if (bytes <= 4 * most) return launch_many<ManyConfig<kRows, 4>>(a, stream, error);
  return bytes <= 8 * most && launch_many<ManyConfig<kRows, 8>>(a, stream, error);
}

inline bool launch_many(const ccq_linear_w8_args& a, cudaStream_t stream, cudaError_t* error) {
  Device device;
  if ((*error = device.ask()) != cudaSuccess) return true;
  if (device.major != 9 || a.n % 64 || a.rows <= 8 || a.rows > CCQ_W8_MANY_ROWS) return false;
  if (a.rows <= 16) return launch_many<16>(a, stream, error);
  if (a.rows <= 32) return launch_many<32>(a, stream, error);
  return launch_many<64>(a, stream, error);
}
#else
inline bool launch_many(const ccq_linear_w8_args&, cudaStream_t, cudaError_t*) { return false; }
#endif

}  // namespace ccq_w8
