// What every launch goes through.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace sliderquant::cuda {

// Makes a device current for one launch and gives the previous one back: this runtime is linked statically and knows
// nothing of the host framework's choice.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

template <class Launch>
const char* launch_on(int device, const Launch& enqueue) {
  const DeviceGuard guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    enqueue();
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// More shared memory than by default has to be asked for, once per device; `asked` remembers where that was done.
template <class Kernel>
cudaError_t ask_for_shared(Kernel kernel, int bytes, int device, std::atomic<uint64_t>& asked) {
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((asked.load() & bit) != 0) return cudaSuccess;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);  // for several blocks
  }
  if (error == cudaSuccess) asked |= bit;
  return error;
}

}  // namespace sliderquant::cuda
