// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch (Hopper and later): a kernel is set up while the one before it still runs.
//
// Every kernel of a decoding step takes microseconds, of which its launch is about one. A kernel launched with
// `launch_early` begins before its predecessor's end and must call wait_for_prerequisites before it reads or writes
// anything that an earlier kernel may touch; all of ours do so before they end, so that the end of one is the end of all
// before it. It begins when every block of its predecessor has called dependents_may_start or ended and there is room: our
// products call it first of all, so that a block's place is taken over as soon as it ends. Before Hopper kernels run one after
// another and the device functions are empty.
#pragma once

#include <cuda_runtime.h>

namespace ccq {

// For the kernel after this one, if launched early: it may start now (by itself, when all blocks have ended).
__device__ inline void dependents_may_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
__device__ inline void wait_for_prerequisites() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

template <typename... P, typename... A>
cudaError_t launch_early(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t stream, A... arguments) {
#if CUDART_VERSION >= 12030  // the first that captures such a launch into a graph
  int id = 0, major = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  if (error != cudaSuccess) return error;
  if (major >= 9) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  }
#endif
  kernel<<<grid, threads, shared, stream>>>(static_cast<P>(arguments)...);
  return cudaGetLastError();
}

}  // namespace ccq
