// What the CUDA library does on raw memory: each function queues its launches and returns. Arguments are checked before,
// in *_ops.cpp, which are compiled by the C++ compiler alone; nvcc compiles the *.cu.
#pragma once

#include <vector>

#include "../cpu/kernels.h"
#include "dpfast/update.h"
#include "launch.h"

namespace dpfast {

// A tensor's part in an op, and how many elements it has.
template <class Part>
struct Sized {
  Part part;
  int64_t n;
};

// Noise and updates read key, step and hyperparameters from device memory: a workspace of so many bytes, which is zeros
// again when they are done.
constexpr int64_t STEP_BYTES = 256;

// Where they are in a graph, which replays launches as they were: on the device, laid out as in
// dpfast/ops/update_in_graph.py. Nothing is written where numbers[0] is 0 or any of lost [B] is true.
struct InMemory {
  const double* numbers;
  const int64_t* words;
  const bool* lost;
  int64_t B;
  bool secure;  // a grid comes with every standard deviation but 0
};

// summed may be null: zeros, for float32 alone.
void noisy_grad(const Queue&, const std::vector<Sized<NoisyGradient>>&, const NoiseArguments&, void* workspace);

void noisy_sgd(const Queue&, const std::vector<Sized<Update>>&, const NoiseArguments&, const SGDArguments&,
               void* workspace);
void noisy_sgd(const Queue&, const std::vector<Sized<Update>>&, const InMemory&, void* workspace);
void noisy_adam(const Queue&, const std::vector<Sized<Update>>&, const NoiseArguments&, const AdamArguments&,
                void* workspace);
void noisy_adam(const Queue&, const std::vector<Sized<Update>>&, const InMemory&, void* workspace);

// n_r,i = √(squared_r,i + bound_r,i) · scale → factors, all [groups, B]; counts samples that are not finite.
struct ClipArguments {
  const double *squared, *bounds, *thresholds;
  double* factors;
  unsigned long long* nonfinite;
  int64_t groups, B, function;
  double shape, scale;
};
void clip_factors(const Queue&, const ClipArguments&);

// Samples [B, n] that are written out.
struct Samples {
  const void* x;
  int64_t n;
  Type type;
};
// out [len(samples), B]; partials has room for norm_partials() doubles.
int64_t norm_partials(const std::vector<Samples>&, int64_t B);
void squared_norms(const Queue&, const std::vector<Samples>&, int64_t B, double* out, double* partials);

// out [n]: float32, or float64 for samples of it. factors [B]: float64 if `wide`, else float32.
struct Weighted {
  Samples samples;
  const void* factors;
  void* out;
};
void weighted_sums(const Queue&, const std::vector<Weighted>&, int64_t B, bool wide);

// G [B, T, d], and for a normalisation layer x, mean (or null) and rstd: out[0] the weight's samples, out[1] the bias';
// for a plain sum out[0] alone. out [B, d] float32, or float64 for G of it.
struct Positions {
  bool normalised;
  const void *G, *x, *mean, *rstd;
  void* out[2];
  double* squared[2];  // [B]
  int64_t B, T, d;
  Type type, statistics;  // of G and x; of mean and rstd
};
int64_t position_partials(const Positions&);  // for each of the sums
void sum_positions(const Queue&, const Positions&, double* partials);

// G [B, T, d] in the order of sorted ids: ids sorted, and order: where each came from, in its sample (norms) or in all.
struct Segments {
  const int64_t *ids, *order;
  const void* G;
  int64_t B, T, d;
  Type type;
};
int64_t embedding_norm_partials(const Segments&);
void embedding_squared_norm(const Queue&, const Segments&, double* squared, double* bound, double* partials);
// out [rows, d] is zeros; float32, or float64 for G of it. factors [B]: float64 if `wide`, else float32.
int64_t embedding_sum_partials(const Segments&);
void embedding_sum(const Queue&, const Segments&, const void* factors, bool wide, int64_t rows, void* out,
                   double* partials);

}  // namespace dpfast
