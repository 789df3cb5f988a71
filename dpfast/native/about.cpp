// Linked into every library: what dpfast.native asks it before and after loading.
#define DPFAST_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef DPFAST_ABOUT_CPU
#include "cpu/kernels.h"

// The instruction set in use: scalar, avx2 or avx512.
DPFAST_EXPORT const char* dpfast_cpu_isa() { return dpfast::kernels().name; }
#endif

// How it was built, as JSON. Found by its first words in the file, before anything is loaded.
DPFAST_EXPORT const char dpfast_about[];
const char dpfast_about[] = "dpfast library " DPFAST_ABOUT;
