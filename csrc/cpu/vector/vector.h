// The functions that vector/ defines, and their table.
#pragma once

#include "../kernels.h"

namespace dpfast::DPFAST_ISA {

void standard_normal(float* out, const NoiseArguments&, uint32_t parameter, int64_t offset, int64_t n);
void noisy_grad(const NoisyGradient&, const NoiseArguments&, int64_t begin, int64_t end);
void noisy_sgd(const Update&, const NoiseArguments&, const void* sgd, int64_t begin, int64_t end);
void noisy_adam(const Update&, const NoiseArguments&, const void* adam, int64_t begin, int64_t end);
double squares(const void* x, Type, int64_t n);
void product_sums(double& sum, double& absolute, const void* a, const void* b, Type, int64_t n);
void sum_rows(void* out, const Rows&, int64_t begin, int64_t end);
void sum_normalised(void* weight, void* bias, const Normalised&, int64_t begin, int64_t end);
void sum_channel(double& weight, double& bias, const Channel&);
int64_t patch_gradient_width(int64_t columns);
double patch_gradient(const PatchGradient&);
void gram_rows(const GramRows&);

}  // namespace dpfast::DPFAST_ISA
