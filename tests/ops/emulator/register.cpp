// torch.ops.dpfast_emulated: the ops' schemas, for csrc/cuda compiled by the C++ compiler.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(dpfast_emulated, library) {
  for (const char* schema : dpfast::kSchemas) library.def(schema);
}
