// Every op once: its name and schema. The CPU and the CUDA library implement them; dpfast/ops/native.py calls them, and
// has the checks that name an argument.
#pragma once

namespace dpfast {

// noise: int[] key (8 words of 32 bits), int step, float std, float grid, float scale
#define DPFAST_NOISE "int[] key, int step, float std, float grid, float scale"
// parameters: one number a tensor, its index in the noise stream; offsets: where in the parameter the tensor starts
#define DPFAST_PLACES "int[] parameters, int[] offsets"
#define DPFAST_ROUNDING "int rounding, int[] rounding_key"
// numbers: float64, words: int64, as many as an update has; secure: whether the noise has a grid
#define DPFAST_IN_MEMORY "Tensor numbers, Tensor words, Tensor lost, bool secure, int rounding"
#define DPFAST_CONVOLUTION \
  "Tensor x, Tensor G, int batch, int groups, int[] kernel, int[] stride, int[] padding, int[] dilation"

inline constexpr const char* kSchemas[] = {
    "standard_normal(Tensor(a!) out, int[] key, int step, int parameter, int offset, float grid) -> ()",
    "noisy_grad_(Tensor[] summed, Tensor(a!)[] grads, " DPFAST_PLACES ", " DPFAST_NOISE ") -> ()",
    "noisy_sgd_(Tensor[] summed, Tensor(a!)[] grads, Tensor(b!)[] params, Tensor(c!)[] momenta, "
    "Tensor(d!)[] masters, " DPFAST_PLACES ", " DPFAST_NOISE ", float lr, float momentum, float dampening, "
    "float weight_decay, bool nesterov, bool maximize, bool first, " DPFAST_ROUNDING ") -> ()",
    "noisy_adam_(Tensor[] summed, Tensor(a!)[] grads, Tensor(b!)[] params, Tensor(c!)[] means, Tensor(d!)[] squares, "
    "Tensor(e!)[] largest, Tensor(f!)[] masters, " DPFAST_PLACES ", " DPFAST_NOISE ", float lr, float beta1, "
    "float beta2, float eps, float weight_decay, float t, float noise, float floor, bool decoupled, bool maximize, " DPFAST_ROUNDING ") -> ()",
    // the same for a CUDA graph, on CUDA alone: key, step and hyperparameters are in numbers and words (see
    // dpfast/ops/update_in_graph.py), and nothing is written where any of lost [B] bool is true
    "noisy_sgd_in_graph_(Tensor[] summed, Tensor(a!)[] grads, Tensor(b!)[] params, Tensor(c!)[] momenta, "
    "Tensor(d!)[] masters, " DPFAST_PLACES ", " DPFAST_IN_MEMORY ") -> ()",
    "noisy_adam_in_graph_(Tensor[] summed, Tensor(a!)[] grads, Tensor(b!)[] params, Tensor(c!)[] means, "
    "Tensor(d!)[] squares, Tensor(e!)[] largest, Tensor(f!)[] masters, " DPFAST_PLACES ", " DPFAST_IN_MEMORY ") -> ()",
    // squared norms and bounds [groups, B] float64, thresholds [groups] float64 → factors [groups, B] float64 and how
    // many samples are not finite, int64 []
    "clip_factors(Tensor squared, Tensor bounds, Tensor thresholds, int function, float shape, float scale) "
    "-> (Tensor factors, Tensor nonfinite)",
    // samples [B, *] each → squared norms [len(samples), B] float64
    "squared_norms(Tensor[] samples) -> Tensor",
    // sides [batch, *] each; of more sides, squared norms [batch] float64 and the elements of a sample → squared norms and
    // bounds on their errors, [2, count, batch] float64, summed over the parameters of each group: parameter j is side
    // first[j], written out, or the product of sides first[j] and second[j]; on the CPU alone
    "side_norms(Tensor[] sides, Tensor[] squares, int[] sizes, int[] first, int[] second, int[] groups, int count, "
    "int batch, bool wide) -> Tensor",
    // A[k] [N, T, d_k], G[k] [N, T, p_k] float32, features one behind the other; the row of each sample, its first
    // position there and its end; what a square may lose to underflow → [n, 5, samples] float64 of n weights: Σ_{t,s}
    // (a_t·a_s)(g_t·g_s), the sum of absolute values, Σ_t ‖a_t‖, Σ_t ‖g_t‖ and Σ_t ‖a_t‖·‖g_t‖; on the CPU alone
    "ghost_stats(Tensor[] A, Tensor[] G, int[] row, int[] first, int[] end, float lost) -> Tensor",
    // samples [B, *] each, factors [B] float32 or [len(samples), B] → Σ_i factor_i g_i [*] each, float32;
    // a sample whose factor is 0 is left out, not multiplied
    "weighted_sums(Tensor[] samples, Tensor factors) -> Tensor[]",
    // G [B, T, d] → Σ_t g_t [B, d] float32 and its squared norms [B] float64
    "sum_positions(Tensor G) -> (Tensor samples, Tensor squared)",
    // G, x [B, T, d], mean, rstd [B, T] (or so many elements) → Σ_t g_t ∘ x̂_t and Σ_t g_t [B, d] float32, each with squared norms [B]
    // (RMSNorm has no mean: an empty tensor)
    "normalised_sums(Tensor G, Tensor x, Tensor mean, Tensor rstd) "
    "-> (Tensor weight, Tensor weight_squared, Tensor bias, Tensor bias_squared)",
    // the same of n layers with one B, for which one call a layer would take longer than its work; on the CPU alone
    "all_position_sums(Tensor[] G) -> (Tensor[] samples, Tensor squared)",
    "all_normalised_sums(Tensor[] G, Tensor[] x, Tensor[] mean, Tensor[] rstd) "
    "-> (Tensor[] weights, Tensor[] biases, Tensor squared)",
    // A [B, *, d], G [B, *, p] of n small weights, float32, factors [B] float32 or [n, B] → Σ_i factor_i G_iᵀ A_i,
    // [p, d] each; a sample whose factor is 0 is left out, not multiplied; on the CPU alone
    "weighted_products(Tensor[] A, Tensor[] G, Tensor factors) -> Tensor[]",
    // the same sides → G_iᵀ A_i [B, p, d] of each, and squared norms [n, B] float64; on the CPU alone
    "product_samples(Tensor[] A, Tensor[] G) -> (Tensor[] samples, Tensor squared)",
    // G, x [R, C, T], mean, rstd [R, groups] → Σ_t g_t · x̂_t and Σ_t g_t [R, C] float32
    "channel_sums(Tensor G, Tensor x, Tensor mean, Tensor rstd) -> (Tensor weight, Tensor bias)",
    // x [rows, g·c, *], G [rows, g·p, *], three spatial dimensions each, rows of a sample side by side → per-sample
    // gradients of a convolution's weight [batch, c·∏kernel, g·p] float32 and their squared norms [batch] float64
    "convolution_grad_samples(" DPFAST_CONVOLUTION ") -> (Tensor samples, Tensor squared)",
    // the same arguments → [5, batch, groups] float64: Σ_{t,s} (a_t·a_s)(g_t·g_s) over patches a and backprops g, the
    // sum of absolute values, Σ_t ‖a_t‖, Σ_t ‖g_t‖ and Σ_t ‖a_t‖ ‖g_t‖
    "convolution_ghost(" DPFAST_CONVOLUTION ") -> Tensor",
    // ids [B, T] int64, G [B, T, d] → squared norms and bounds [B] float64, from segments of equal ids
    "embedding_squared_norm(Tensor ids, Tensor G) -> (Tensor squared, Tensor bound)",
    // ids [B, T], G [B, T, d], factors [B] float32 → Σ_i factor_i · g_i as [rows, d] float32, in a fixed order
    "embedding_sum(Tensor ids, Tensor G, Tensor factors, int rows) -> Tensor",
};

}  // namespace dpfast
