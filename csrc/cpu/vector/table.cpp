#include "vector.h"

#define DPFAST_TEXT(x) DPFAST_TEXT_(x)
#define DPFAST_TEXT_(x) #x

namespace dpfast::DPFAST_ISA {

extern const Kernels table;
const Kernels table{DPFAST_TEXT(DPFAST_ISA), standard_normal, noisy_grad, noisy_sgd, noisy_adam,
                    squares, product_sums, sum_rows, sum_normalised, sum_channel, patch_gradient_width, patch_gradient,
                    gram_rows};

}  // namespace dpfast::DPFAST_ISA
