// torch.ops.dpfast: the schemas. Defined by whichever library is loaded first; the other then finds them there.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(dpfast, library) {
  for (const char* schema : dpfast::kSchemas) library.def(schema);
}
