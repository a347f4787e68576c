// SPDX-License-Identifier: Apache-2.0
// When linear_w8_few.cuh and linear_w8_many.cuh serve a call, and their launches.
//
// Functions return false where the GPU or the shape calls for the other kernel; else the launch's error is in `error`.
#pragma once

#include <algorithm>
#include <atomic>

#include "linear_w8_few.cuh"
#include "linear_w8_many.cuh"

namespace ccq_w8 {

struct Device {
  int id = 0, major = 0, shared = 0, processors = 0;  // shared memory that a block may ask for, in bytes

  cudaError_t ask() {
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
bool launch_many(const ccq_linear_w8_args& a, const Device& device, cudaStream_t stream, cudaError_t* error) {
  const size_t shared = C::shared_bytes(a.k);
  if (shared > static_cast<size_t>(device.shared)) return false;
  auto kernel = many<C>;
  *error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (*error != cudaSuccess) return true;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = C::kSlices, attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(C::kSlices), config.blockDim = dim3(C::kThreads), config.dynamicSmemBytes = shared;
  config.stream = stream, config.attrs = attributes, config.numAttrs = 1;
  // Clusters that run at once, of each GPU; asking takes longer than the product.
  constexpr int kMostGpus = 64;
  static std::atomic<int> known[kMostGpus];
  int most = device.id < kMostGpus ? known[device.id].load() : 0;
  if (most == 0) {
    *error = cudaOccupancyMaxActiveClusters(&most, kernel, &config);
    if (*error != cudaSuccess) return true;
    if (most == 0) return false;
    if (device.id < kMostGpus) known[device.id].store(most);
  }
  const int tiles = (a.n + C::kColumns - 1) / C::kColumns, each = (tiles + most - 1) / most, clusters = (tiles + each - 1) / each;
  config.gridDim = dim3(C::kSlices * clusters), config.numAttrs = 2;
  *error = cudaLaunchKernelEx(&config, kernel, a, clusters);
  return true;
}
#endif

inline bool launch_many(const ccq_linear_w8_args& a, cudaStream_t stream, cudaError_t* error) {
#ifdef CCQ_SM90A
  Device device;
  if (a.rows < 9 || a.rows > 64 || a.k > kFewMostK) return false;
  if ((*error = device.ask()) != cudaSuccess) return true;
  if (device.major != 9) return false;
  if (a.rows <= 16) return launch_many<ManyConfig<16, 4, 8, 2, 4>>(a, device, stream, error);
  if (a.rows <= 32) return launch_many<ManyConfig<32, 4, 5, 2, 1>>(a, device, stream, error);
  if (a.rows <= 48) return launch_many<ManyConfig<48, 8, 5, 2, 1>>(a, device, stream, error);
  return launch_many<ManyConfig<64, 8, 4, 2, 1>>(a, device, stream, error);
#else
  return false;
#endif
}

}  // namespace ccq_w8
