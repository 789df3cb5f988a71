// As much of CUDA as csrc/cuda uses, on one CPU thread: its kernels, launches and tables run where no GPU is, and are
// compared with the CPU library to the bit. It finds wrong indices, unwritten outputs, misaligned vectors and barriers
// that not all threads reach; it cannot find races, and says nothing about speed.
//
// A CUDA thread is a fiber: it runs until a barrier or a warp operation, and goes on when all threads concerned are there.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__ &  // a large parameter is not copied for every thread

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
// Two, so that small tests have pieces of every size.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }

// A graph: what is queued while there is a capture runs when it is replayed, with the arguments that it was queued with.
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
namespace emulator {
inline bool capturing = false;
inline std::vector<std::function<void()>> graph;
inline std::vector<std::shared_ptr<void>> kept;  // memory that the graph uses

inline void queue(std::function<void()> work) {
  if (capturing)
    graph.push_back(std::move(work));
  else
    work();
}
}  // namespace emulator
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulator::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  emulator::queue([=] { memset(p, value, bytes); });
  return cudaSuccess;
}

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

[[noreturn]] inline void fail(const char* why) {
  fprintf(stderr, "emulated kernel: %s (block %u, thread %u)\n", why, blockIdx.x, threadIdx.x);
  abort();
}

enum class At { running, warp, block, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  At at;
  int operation;  // which of the warp's operations it waits in
  uint64_t slot;  // what it hands to its warp
  static constexpr size_t stack_bytes = 1 << 17;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void fiber_main() {
  body();
  fibers[threadIdx.x].at = At::done;
}

inline void wait(At at, int operation) {
  Fiber& self = fibers[threadIdx.x];
  self.at = at, self.operation = operation;
  const Index mine = threadIdx;
  swapcontext(&self.context, &scheduler);
  threadIdx = mine;
}

// Let the fibers [first, last) go on if all are at `at`, in the same operation.
inline bool release(size_t first, size_t last, At at) {
  for (size_t k = first; k < last; ++k) {
    if (fibers[k].at != at) return false;
    if (fibers[k].operation != fibers[first].operation) fail("threads of a warp are in different operations");
  }
  for (size_t k = first; k < last; ++k) fibers[k].at = At::running;
  return true;
}

inline void run_block(unsigned threads) {
  while (fibers.size() < threads) fibers.emplace_back();
  for (unsigned k = 0; k < threads; ++k) {
    Fiber& fiber = fibers[k];
    fiber.at = At::running;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, Fiber::stack_bytes};
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (;;) {
    size_t done = 0;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned k = blockIdx.x % 2 ? threads - 1 - i : i;  // a missing barrier shows in one of the orders
      if (fibers[k].at == At::running) {
        threadIdx.x = k;
        swapcontext(&scheduler, &fibers[k].context);
      }
      done += fibers[k].at == At::done;
    }
    if (done == threads) return;
    const bool moved_block = release(0, threads, At::block);
    bool moved = moved_block;
    for (unsigned k = 0; k < threads && !moved_block; k += 32) {
      const unsigned last = k + 32 < threads ? k + 32 : threads;
      bool any = false;
      for (unsigned j = k; j < last; ++j) any |= fibers[j].at == At::warp;
      if (any && (last != k + 32 || !release(k, last, At::warp))) fail("not all threads of a warp reach an operation");
      moved |= any;
    }
    if (!moved) fail("not all threads of a block reach a barrier");
  }
}

inline uint64_t exchange(uint64_t mine, int from, int operation) {
  fibers[threadIdx.x].slot = mine;
  wait(At::warp, operation);
  const uint64_t theirs = fibers[threadIdx.x / 32 * 32 + from].slot;
  wait(At::warp, operation);
  return theirs;
}

template <class T>
T shuffle(unsigned lanes, T x, int from, int operation) {
  static_assert(sizeof(T) <= 8);
  if (lanes != 0xFFFFFFFFu) fail("a warp operation without all lanes");
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  bits = exchange(bits, from & 31, operation);
  memcpy(&x, &bits, sizeof(T));
  return x;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::At::block, 0); }
template <class T>
T __shfl_sync(unsigned lanes, T x, int from) {
  return emulator::shuffle(lanes, x, from, 1);
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T x, int with) {
  return emulator::shuffle(lanes, x, int(threadIdx.x % 32) ^ with, 2);
}
inline unsigned __ballot_sync(unsigned lanes, bool x) {
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= unsigned(emulator::shuffle(lanes, uint64_t(x), lane, 3)) << lane;
  return all;
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  const unsigned long long before = *p;
  *p += x;
  return before;
}

template <class... Parameters, class... Arguments>
void emulate(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, const Arguments&... arguments) {
  emulator::queue([=] {
    blockDim.x = threads, gridDim.x = blocks;
    emulator::body = [&] { kernel(arguments...); };
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) emulator::run_block(threads);
  });
}
