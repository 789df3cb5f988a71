// What the CPU library does on raw memory. Every function is compiled once for each instruction set, from the files in
// vector/; kernels() is the best table that this machine runs.
#pragma once

#include <cstdint>

#include "dpfast/clip.h"

namespace dpfast {

enum class Type { float32, float64, bfloat16, float16 };

// How a summed gradient becomes a noisy one: (summed + std · z) · scale. With grid > 0 the noise is secure and the sum
// is made of whole multiples of `grid`.
struct NoiseArguments {
  uint32_t key[8];
  uint32_t step;
  double std, grid, scale;
};

// One tensor's part in an op. Elements are counted from `offset` in the noise stream of `parameter`.
struct NoisyGradient {
  const void* summed;
  void* grad;  // may be the same memory as summed
  Type summed_type, grad_type;
  uint32_t parameter;
  int64_t offset;
};

enum class Rounding : int64_t { nearest, stochastic };

// An optimizer's update of one tensor, all of `type` but the float32 master copy.
struct Update {
  NoisyGradient gradient;
  Type type;
  void* parameter;
  void* state[3];  // SGD: momentum; Adam: mean, square, largest; null where not used
  float* master;   // the parameter's float32 copy, or null
  Rounding rounding;
  uint32_t rounding_key[2];
};

// Rows to be added up, each times its factor: row k starts stride · index[k] elements (stride · k without an index)
// after the first. Results are float, or double for float64 rows.
struct Rows {
  Type type;
  const void* first;
  int64_t stride, count;
  const int64_t* index;
  const double* factors;  // null: all 1
};

// One sample of a normalisation layer: rows of G and x, mean and rstd of each row.
struct Normalised {
  Type type;
  const void *G, *x;
  int64_t stride, count;
  const double *mean, *rstd;  // null mean: all 0
};

// One channel of a row of a group normalisation: n positions of G and x, and the mean and rstd of its group.
struct Channel {
  Type type;
  const void *G, *x;
  int64_t n;
  double mean, rstd;
};

// Σ_t patch_tᵀ G_t of one sample: element e of the patch at position t is x[elements[e] + places[t]]. G has `positions`
// rows, `width` apart; `columns` of them count, up to patch_gradient_width(columns) are zeros. The result is
// [size, columns], its rows `stride` apart.
struct PatchGradient {
  const float* x;
  const int64_t* elements;
  int64_t size;
  const int64_t* places;
  int64_t positions;
  const float* G;
  int64_t width, columns;
  float* out;
  int64_t stride;
};

// x_iᵀ x_j of rows that lie `stride` apart in x, `size` features each: out [rows, width] has those with i < rows and
// i <= j < width. What is in front of the diagonal is not meant for reading.
struct GramRows {
  const float* x;
  int64_t stride, size, rows, width;
  float* out;
};

struct Kernels {
  const char* name;
  void (*standard_normal)(float* out, const NoiseArguments&, uint32_t parameter, int64_t offset, int64_t n);
  void (*noisy_grad)(const NoisyGradient&, const NoiseArguments&, int64_t begin, int64_t end);
  void (*noisy_sgd)(const Update&, const NoiseArguments&, const void* sgd, int64_t begin, int64_t end);
  void (*noisy_adam)(const Update&, const NoiseArguments&, const void* adam, int64_t begin, int64_t end);
  double (*squares)(const void* x, Type, int64_t n);
  void (*product_sums)(double& sum, double& absolute, const void* a, const void* b, Type, int64_t n);
  void (*sum_rows)(void* out, const Rows&, int64_t begin, int64_t end);  // columns
  void (*sum_normalised)(void* weight, void* bias, const Normalised&, int64_t begin, int64_t end);
  void (*sum_channel)(double& weight, double& bias, const Channel&);
  int64_t (*patch_gradient_width)(int64_t columns);
  double (*patch_gradient)(const PatchGradient&);  // its squared norm
  void (*gram_rows)(const GramRows&);
};

const Kernels& kernels();

}  // namespace dpfast
