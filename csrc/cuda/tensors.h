// CUDA tensors of the stable ABI, and where their kernels are queued.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "../cpu/tensors.h"
#include "kernels.h"
#include "launch.h"

namespace dpfast {

#ifdef DPFAST_EMULATED  // tests/ops/emulator: the same library on CPU tensors
struct Place {
  Queue queue;
  Place(const Tensor&, const char* op) : queue{nullptr, op} {}
};
inline bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }
#define DPFAST_LIBRARY dpfast_emulated
#define DPFAST_KEY CPU
#else
// The function is in libtorch_cuda, which a machine that only builds this library need not have.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "dpfast: this process has no libtorch_cuda.so, or one without the current stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the tensor's device the current one for as long as it lives.
struct __attribute__((visibility("hidden"))) Place {
  torch::stable::accelerator::DeviceGuard guard;
  Queue queue;
  Place(const Tensor& tensor, const char* op)
      : guard(tensor.get_device_index()), queue{current_stream(tensor.get_device_index()), op} {}
};
inline bool is_here(const Tensor& tensor) { return tensor.is_cuda(); }
#define DPFAST_LIBRARY dpfast
#define DPFAST_KEY CUDA
#endif

// Whether what is queued now goes into a CUDA graph.
inline bool is_captured(const Queue& queue) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_code(cudaStreamIsCapturing(queue.stream, &status), queue.op);
  return status != cudaStreamCaptureStatusNone;
}

// Where the numbers of a step are kept while its kernels run; see kernels.h.
inline Tensor step_workspace(const Tensor& like) {
  Tensor workspace = torch::stable::new_empty(like, {STEP_BYTES}, ScalarType::Byte);
#ifdef DPFAST_EMULATED  // a graph's memory stays its own
  if (is_captured({nullptr, ""})) emulator::kept.push_back(std::make_shared<Tensor>(workspace));
#endif
  return workspace;
}

inline void check_on_device(const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(is_here(tensor) && tensor.get_device_index() == like.get_device_index() && tensor.is_contiguous() &&
                      tensor.numel() == like.numel(),
                  "dpfast: tensors of one parameter must be contiguous, on one CUDA device and of one size");
}

}  // namespace dpfast
