// Launches, each checked in the name of its op.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dpfast {

// Where an op runs: the current stream of the device of its tensors, and the op's name for messages.
struct Queue {
  cudaStream_t stream;
  const char* op;
};

inline void check_code(cudaError_t code, const char* op) {
  if (code != cudaSuccess)
    throw std::runtime_error(std::string("dpfast: ") + op + " on CUDA: " + cudaGetErrorString(code));
}

#if defined(__CUDACC__) || defined(DPFAST_EMULATED)
template <class... Parameters, class... Arguments>
void launch(const Queue& queue, void (*kernel)(Parameters...), int64_t blocks, int threads,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error(std::string("dpfast: ") + queue.op + " on CUDA: too much for one launch");
#ifdef DPFAST_EMULATED  // tests/ops/emulator: the same kernels on the CPU
  emulate(kernel, unsigned(blocks), unsigned(threads), arguments...);
#else
  kernel<<<unsigned(blocks), threads, 0, queue.stream>>>(arguments...);
#endif
  check_code(cudaGetLastError(), queue.op);
}
#endif

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace dpfast
