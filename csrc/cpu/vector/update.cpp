// noisy_grad and the optimizer's update in one pass over memory.
#include "dpfast/update.h"

#include "noise_loop.h"
#include "vector.h"

namespace dpfast::DPFAST_ISA {

template <class T>
DPFAST_FN f32 rounded_to(const T*, f32 x) {
  T narrowed[W];
  write(narrowed, x);
  return read(narrowed);
}

// A rule is `f32 rule(f32 parameter, f32 gradient, f32 state[])`, with its number of state tensors.
template <class T, int states, bool master, bool rounded, class Rule>
inline void update(const Update& u, const NoiseArguments& noise, int64_t begin, int64_t end, const Rule& rule) {
  const NoisyGradient& g = u.gradient;
  const float* summed = static_cast<const float*>(g.summed);
  T *grad = static_cast<T*>(g.grad), *parameter = static_cast<T*>(u.parameter);
  T* state[states + 1];
  for (int k = 0; k < states; ++k) state[k] = static_cast<T*>(u.state[k]);
  float* copy = u.master;
  Stream stream{};
  stream.key[0] = u.rounding_key[0], stream.key[1] = u.rounding_key[1];
  stream.step = noise.step, stream.parameter = g.parameter;
  noise_loop(noise, g.parameter, g.offset, begin, end, [&](int64_t i, auto lanes, const auto& with) {
    // The noise of a tile keeps the core busy for so long that what the hardware fetches ahead runs dry.
    constexpr int ahead = 4 * TILE;
    __builtin_prefetch(summed + i + ahead, 1);
    __builtin_prefetch(parameter + i + ahead, 1);
    for (int k = 0; k < states; ++k) __builtin_prefetch(state[k] + i + ahead, 1);
    const f32 gradient = with.add(read(summed + i, lanes));
    if (grad) write(grad + i, gradient, lanes);
    f32 s[states + 1];
    for (int k = 0; k < states; ++k) s[k] = read(state[k] + i, lanes);
    f32 before = read(parameter + i, lanes);
    if constexpr (master) {  // a parameter that is not its copy's rounding was set from outside
      const f32 kept = read(copy + i, lanes);
      before = select(before == rounded_to(parameter, kept), kept, before);
    }
    const f32 after = rule(before, gradient, s);
    for (int k = 0; k < states; ++k) write(state[k] + i, s[k], lanes);
    if constexpr (master) write(copy + i, after, lanes);
    if constexpr (rounded)
      write(parameter + i, after, lanes, rounding_words(stream, uint64_t(g.offset + i)));
    else
      write(parameter + i, after, lanes);
  });
}

template <int states, class Rule>
inline void update_any(const Update& u, const NoiseArguments& noise, int64_t begin, int64_t end, const Rule& rule) {
  with_type(u.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) == 2) {
      if (u.rounding == Rounding::stochastic) return update<T, states, false, true>(u, noise, begin, end, rule);
      if (u.master) return update<T, states, true, false>(u, noise, begin, end, rule);
    }
    update<T, states, false, false>(u, noise, begin, end, rule);
  });
}

void noisy_sgd(const Update& u, const NoiseArguments& noise, const void* constants, int64_t begin, int64_t end) {
  const SGD c = *static_cast<const SGD*>(constants);
  if (u.state[0])
    update_any<1>(u, noise, begin, end, [c](f32 p, f32 g, f32* s) { return step(c, p, g, s[0]); });
  else
    update_any<0>(u, noise, begin, end, [c](f32 p, f32 g, f32* s) { return step(c, p, g, s[0]); });
}

void noisy_adam(const Update& u, const NoiseArguments& noise, const void* constants, int64_t begin, int64_t end) {
  const Adam c = *static_cast<const Adam*>(constants);
  if (u.state[2])
    update_any<3>(u, noise, begin, end, [c](f32 p, f32 g, f32* s) { return step<true>(c, p, g, s[0], s[1], s[2]); });
  else
    update_any<2>(u, noise, begin, end, [c](f32 p, f32 g, f32* s) { return step<false>(c, p, g, s[0], s[1], s[2]); });
}

}  // namespace dpfast::DPFAST_ISA
