// SPDX-License-Identifier: Apache-2.0
// The few functions of CUDA's runtime that choosing a kernel calls, for devices that are not there. Nothing can be launched.
#include <stddef.h>

extern "C" {

int pretended_device = 0;

// Multiprocessors, major compute capability, shared memory a block may have (tests/helpers/held_kernels.py has the names).
static const int kDevices[][3] = {{132, 9, 232448}, {108, 8, 166912}, {128, 8, 101376}};

int cudaGetDevice(int* device) {
  *device = pretended_device;
  return 0;
}

// Attributes by their numbers in driver_types.h.
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 16: *value = kDevices[device][0]; return 0;  // cudaDevAttrMultiProcessorCount
    case 75: *value = kDevices[device][1]; return 0;  // cudaDevAttrComputeCapabilityMajor
    case 97: *value = kDevices[device][2]; return 0;  // cudaDevAttrMaxSharedMemoryPerBlockOptin
    default: return 1;
  }
}

// Called when the library is loaded and unloaded.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}

// Named by the launches that are compiled with the choice, and never called.
int __cudaGetKernel(void**, const void*) { return 1; }
int __cudaInitModule() { return 1; }
int __cudaLaunchKernel() { return 1; }
int __cudaPopCallConfiguration() { return 1; }
int __cudaPushCallConfiguration() { return 1; }
int cudaFuncSetAttribute() { return 1; }
int cudaGetLastError() { return 1; }
int cudaLaunchKernelExC() { return 1; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags() { return 1; }

}  // extern "C"
