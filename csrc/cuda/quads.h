// Four consecutive elements at a time: one access of 16 bytes (8 for 16-bit types) where their address allows it.
#pragma once

#include <cuda_runtime.h>

#include "dpfast/narrow.h"

namespace dpfast::DPFAST_ISA {

// The type that elements are added up in.
template <class T>
struct SumType {
  using type = float;
};
template <>
struct SumType<double> {
  using type = double;
};
template <class T>
using Sum = typename SumType<T>::type;

template <class T>
DPFAST_FN Sum<T> value(T x) {  // a copy: read() of memory goes byte by byte on a GPU
  if constexpr (sizeof(T) == 8)
    return x;
  else
    return read(&x);
}

// Memory in vectors of the hardware: uint4, uint2, and two double2 for doubles.
template <int bytes>
struct Vector;
template <>
struct Vector<8> {
  using type = uint2;
};
template <>
struct Vector<16> {
  using type = uint4;
};

// In assembly: the compiler takes a plain assignment apart where the same elements are written elsewhere too.
DPFAST_FN void store_vector(uint2* p, uint2 v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y) : "memory");
#else
  *p = v;
#endif
}
DPFAST_FN void store_vector(uint4* p, uint4 v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
#else
  *p = v;
#endif
}

template <class T>
struct Quad {
  T at[4];
};

template <class T>
DPFAST_FN Quad<T> load_quad(const T* p) {
  constexpr int parts = sizeof(T) == 8 ? 2 : 1;
  using V = typename Vector<4 * sizeof(T) / parts>::type;
  V vectors[parts];
  DPFAST_UNROLL
  for (int k = 0; k < parts; ++k) vectors[k] = reinterpret_cast<const V*>(p)[k];
  Quad<T> quad;
  memcpy(&quad, vectors, sizeof(quad));
  return quad;
}

template <class T>
DPFAST_FN void store_quad(T* p, const Quad<T>& quad) {
  constexpr int parts = sizeof(T) == 8 ? 2 : 1;
  using V = typename Vector<4 * sizeof(T) / parts>::type;
  V vectors[parts];
  memcpy(vectors, &quad, sizeof(quad));
  DPFAST_UNROLL
  for (int k = 0; k < parts; ++k) store_vector(reinterpret_cast<V*>(p) + k, vectors[k]);
}

// Which of the elements i, ..., i + 3 are there: those from `low` to `high` - 1. `whole`: all, and aligned in memory.
struct Span {
  int i, low, high;
  bool whole;
  DPFAST_FN bool has(int j) const { return i + j >= low && i + j < high; }
};

// x = p[0 .. 3]; elements that are not there become 0.
template <class T>
DPFAST_FN void get(Sum<T> x[4], const T* p, const Span& span) {
  Quad<T> quad;
  if (span.whole) {
    quad = load_quad(p);
  } else {
    DPFAST_UNROLL
    for (int j = 0; j < 4; ++j) quad.at[j] = span.has(j) ? p[j] : T{};
  }
  DPFAST_UNROLL
  for (int j = 0; j < 4; ++j) x[j] = value(quad.at[j]);
}

// p[0 .. 3] = quad, where it is there.
template <class T>
DPFAST_FN void set(T* p, const Quad<T>& quad, const Span& span) {
  if (span.whole) {
    store_quad(p, quad);
  } else {
    DPFAST_UNROLL
    for (int j = 0; j < 4; ++j)
      if (span.has(j)) p[j] = quad.at[j];
  }
}

// Rounded to the nearest, or with a random word for each.
template <class T, class... Random>
DPFAST_FN void set_rounded(T* p, const float x[4], const Span& span, const Random*... random) {
  Quad<T> quad;
  DPFAST_UNROLL
  for (int j = 0; j < 4; ++j) write(quad.at + j, x[j], random[j]...);
  set(p, quad, span);
}

}  // namespace dpfast::DPFAST_ISA
