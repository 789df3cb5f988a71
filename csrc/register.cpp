// torch.ops.dpfast: the schemas. Compiled into the CPU library alone; the CUDA library needs that one.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(dpfast, library) {
  for (const char* schema : dpfast::kSchemas) library.def(schema);
}
