// From checked arguments to a kernel: torch's threads on CPUs, its current stream on GPUs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstddef>
#include <cstdint>

#include "../cpu/api.h"
#include "check.h"
#ifdef SLIDERQUANT_CUDA
#include <dlfcn.h>

#include "../cuda/launch.h"
#endif

namespace sliderquant::binding {

inline void run_parallel(int64_t count, int64_t grain, cpu::RangeBody body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

#ifdef SLIDERQUANT_CUDA
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// Looked up where the first CUDA tensor arrives: this library links libtorch_cpu alone, and torch loads its CUDA part,
// if it has one, out of the linker's sight. Null under a torch built for CPUs alone.
inline CurrentStream current_cuda_stream() {
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return function;
}

// enqueue(stream) returns the text of a CUDA error, or null.
template <class Enqueue>
void run_cuda(const char* op, int device, const Enqueue& enqueue) {
  const CurrentStream current_stream = current_cuda_stream();
  if (current_stream == nullptr) {
    fail(op, "no aoti_torch_get_current_cuda_stream in libtorch_cuda.so; install a CUDA build of torch 2.11 or later");
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(current_stream(device, &stream));
  if (const char* error = enqueue(reinterpret_cast<uintptr_t>(stream))) fail(op, "CUDA: ", error);
}

template <class Args>
void run_cuda(const char* op, const Args& args, int device, const char* (*launch)(const Args&, int, uintptr_t)) {
  run_cuda(op, device, [&](uintptr_t stream) { return launch(args, device, stream); });
}

inline void check_aligned(const char* op, const char* name, const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    fail(op, name, ": expected an address that is a multiple of 16; got ", address);
  }
}

// launch(workspace, stream) of a product of m tokens and n output channels. The workspace goes back to torch's
// allocator as soon as the kernels are enqueued: what is allocated next on the same stream runs after them.
template <class T, class Launch>
void run_planned(const char* op, const Tensor& x, ScalarType type, const cuda::Plan& plan, int64_t m,
                 int64_t n, const Launch& launch) {
  const int64_t size = cuda::workspace_size(plan, m, n);
  Optional workspace;
  if (size > 0) workspace = torch::stable::new_empty(x, {size}, type);
  auto* partial = workspace.has_value() ? static_cast<T*>(workspace->mutable_data_ptr()) : nullptr;
  run_cuda(op, x.device().index(), [&](uintptr_t stream) { return launch(partial, stream); });
}

inline void wna16_cuda(const char* op, const Tensor& x, const Wna16& args) {
  check_aligned(op, "w_packed", args.w);
  const int device = x.device().index();
  const auto plan = cuda::plan(args, device);
  run_planned<float>(op, x, ScalarType::Float, plan, args.m, args.n, [&](float* workspace, uintptr_t stream) {
    return cuda::wna16(args, plan, workspace, device, stream);
  });
}

inline void integer_cuda(const char* op, const Tensor& codes, const IntegerGemm& args) {
  check_aligned(op, "w_packed", args.w);
  check_aligned(op, "codes", args.codes);
  const int device = codes.device().index();
  const auto plan = cuda::plan(args, device);
  run_planned<uint32_t>(op, codes, ScalarType::Int, plan, args.m, args.n, [&](uint32_t* workspace, uintptr_t stream) {
    return cuda::integer_gemm(args, plan, workspace, device, stream);
  });
}

inline void wna16_grouped_cuda(const char* op, const Tensor& x, const Wna16& args,
                        const Experts& experts) {
  check_aligned(op, "w_packed", args.w);
  const int device = x.device().index();
  const auto plan = cuda::plan_grouped(args, experts.count, device);
  run_planned<float>(op, x, ScalarType::Float, plan, args.m, args.n, [&](float* workspace, uintptr_t stream) {
    return cuda::wna16_grouped(args, experts, plan, workspace, device, stream);
  });
}

inline void integer_grouped_cuda(const char* op, const Tensor& codes, const IntegerGemm& args,
                          const Experts& experts) {
  check_aligned(op, "w_packed", args.w);
  check_aligned(op, "codes", args.codes);
  const int device = codes.device().index();
  const auto plan = cuda::plan_grouped(args, experts.count, device);
  run_planned<uint32_t>(op, codes, ScalarType::Int, plan, args.m, args.n, [&](uint32_t* workspace, uintptr_t stream) {
    return cuda::integer_gemm_grouped(args, experts, plan, workspace, device, stream);
  });
}
#define SLIDERQUANT_LAUNCH(kernel) cuda::kernel
#else
template <class Args>
void run_cuda(const char* op, const Args&, int, std::nullptr_t) {
  fail(op, "this library is built without CUDA kernels; build it again where nvcc is installed");
}

inline void wna16_cuda(const char* op, const Tensor& x, const Wna16& args) {
  run_cuda(op, args, x.device().index(), nullptr);
}

inline void integer_cuda(const char* op, const Tensor& codes, const IntegerGemm& args) {
  run_cuda(op, args, codes.device().index(), nullptr);
}

inline void wna16_grouped_cuda(const char* op, const Tensor& x, const Wna16& args, const Experts&) {
  wna16_cuda(op, x, args);
}

inline void integer_grouped_cuda(const char* op, const Tensor& codes, const IntegerGemm& args,
                          const Experts&) {
  integer_cuda(op, codes, args);
}
#define SLIDERQUANT_LAUNCH(kernel) nullptr
#endif

}  // namespace sliderquant::binding
