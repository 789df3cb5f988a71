// torch.ops.dpfast_emulated: the ops' schemas, for csrc/cuda compiled by the C++ compiler.
#include <torch/csrc/stable/library.h>

#include "cuda_runtime.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(dpfast_emulated, library) {
  for (const char* schema : dpfast::kSchemas) library.def(schema);
}

extern "C" __attribute__((visibility("default"))) void dpfast_emulated_capture(bool on) {
  if (on) emulator::graph.clear(), emulator::kept.clear();
  emulator::capturing = on;
}

extern "C" __attribute__((visibility("default"))) void dpfast_emulated_replay() {
  for (const auto& work : emulator::graph) work();
}
