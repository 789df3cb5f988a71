// Per-sample gradients of convolutions. A convolution is a linear layer over the patches of its input; here the patches
// are read where they are, in a padded float32 copy of one sample's input.
#include <limits>

#include "arguments.h"

namespace dpfast {
namespace {

constexpr int AXES = 3;  // fewer spatial dimensions come with 1s in front

// Lines of few floats, for which a call of memcpy takes longer than the copy.
inline void copy_line(const float* from, int64_t n, float* to) {
  constexpr int64_t STEP = 4;
  if (n > 64) {
    std::copy_n(from, n, to);
    return;
  }
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) memcpy(to + i, from + i, STEP * sizeof(float));
  for (; i < n; ++i) to[i] = from[i];
}

void widen(const void* from, Type type, int64_t first, int64_t n, float* to) {
  switch (type) {
    case Type::float32:
      copy_line(static_cast<const float*>(from) + first, n, to);
      break;
    case Type::bfloat16:
      for (int64_t i = 0; i < n; ++i) to[i] = scalar::read(static_cast<const scalar::bf16*>(from) + first + i);
      break;
    case Type::float16:
      for (int64_t i = 0; i < n; ++i) to[i] = scalar::read(static_cast<const scalar::f16*>(from) + first + i);
      break;
    case Type::float64:
      break;
  }
}

void check_sizes(const Integers& sizes, const char* name, int64_t least) {
  STD_TORCH_CHECK(sizes.size() == AXES, "dpfast: ", name, " must have three numbers, one for each axis");
  for (int64_t size : sizes)
    STD_TORCH_CHECK(size >= least, "dpfast: ", name, " must not have numbers below ", least, ", got ", size);
}

// Where everything is in the padded copy of one sample and group: rows × channels × the sizes that patches reach.
struct Layout {
  int64_t rows, channels, sizes[AXES], out[AXES], outer, step_x;
  Integers places, elements;  // of positions, and of a patch's elements from a position

  Layout(int64_t rows, int64_t channels, const Tensor& positions, const Integers& kernel, const Integers& stride,
         const Integers& dilation)
      : rows(rows), channels(channels), step_x(stride[2]) {
    int64_t step[AXES];
    for (int axis = 0; axis < AXES; ++axis) {
      out[axis] = positions.size(2 + axis);
      sizes[axis] = std::max<int64_t>(0, (out[axis] - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1);
    }
    step[2] = 1, step[1] = sizes[2], step[0] = sizes[1] * sizes[2];
    outer = sizes[0] * step[0];
    for (int64_t row = 0; row < rows; ++row)
      each(out, [&](int64_t z, int64_t y, int64_t x) {
        places.push_back(row * channels * outer + z * stride[0] * step[0] + y * stride[1] * step[1] + x * stride[2]);
      });
    const int64_t* k = kernel.data();
    for (int64_t channel = 0; channel < channels; ++channel)
      each(k, [&](int64_t z, int64_t y, int64_t x) {
        elements.push_back(channel * outer + z * dilation[0] * step[0] + y * dilation[1] * step[1] + x * dilation[2]);
      });
  }

  template <class F>
  static void each(const int64_t* sizes, const F& f) {
    for (int64_t z = 0; z < sizes[0]; ++z)
      for (int64_t y = 0; y < sizes[1]; ++y)
        for (int64_t x = 0; x < sizes[2]; ++x) f(z, y, x);
  }

  // Element e of all patches, given where it is in the first one.
  void pack(const float* from, float* to) const {
    if (step_x == 1 && out[2] == 4) return pack_lines<4>(from, to);
    if (step_x == 1 && out[2] == 8) return pack_lines<8>(from, to);
    if (step_x == 1 && out[2] == 16) return pack_lines<16>(from, to);
    for (size_t t = 0; t < places.size(); t += out[2], to += out[2]) {
      const float* line = from + places[t];
      if (step_x == 1)
        copy_line(line, out[2], to);
      else
        for (int64_t x = 0; x < out[2]; ++x) to[x] = line[x * step_x];
    }
  }

  template <int LENGTH>
  void pack_lines(const float* from, float* to) const {
    const int64_t* place = places.data();
    for (const int64_t* end = place + places.size(); place != end; place += LENGTH, to += LENGTH)
      memcpy(to, from + *place, LENGTH * sizeof(float));
  }

  // One row and channel of `size` that begins at element `at` of `from`, into its place; what is padding is 0 already.
  void copy(const void* from, Type type, int64_t at, const int64_t* size, const Integers& padding, float* to) const {
    const int64_t width = std::min(size[2], sizes[2] - padding[2]);
    for (int64_t z = 0; z < std::min(size[0], sizes[0] - padding[0]); ++z)
      for (int64_t y = 0; y < std::min(size[1], sizes[1] - padding[1]); ++y) {
        const int64_t first = at + (z * size[1] + y) * size[2];
        float* line = to + ((z + padding[0]) * sizes[1] + y + padding[1]) * sizes[2] + padding[2];
        if (width > 0) widen(from, type, first, width, line);
      }
  }
};

// The arguments of both ops, checked; and where the patches are.
struct Convolution {
  // A tensor [R, C, *]: what it holds of one row and channel, and where; asked once, as each question is a call of torch.
  struct Side {
    const void* data;
    Type type;
    int64_t channels, size[AXES], line;

    explicit Side(const Tensor& tensor)
        : data(tensor.const_data_ptr()), type(type_of(tensor)), channels(tensor.size(1)),
          size{tensor.size(2), tensor.size(3), tensor.size(4)}, line(size[0] * size[1] * size[2]) {}
  };

  const Integers& padding;
  int64_t batch, groups, sample_rows, channels, rows;
  Side x, G;
  Layout layout;

  Convolution(const Tensor& x, const Tensor& G, int64_t batch, int64_t groups, const Integers& kernel,
              const Integers& stride, const Integers& padding, const Integers& dilation)
      : padding(padding), batch(batch), groups(groups),
        sample_rows(check(x, G, batch, groups, kernel, stride, padding, dilation)), channels(x.size(1) / groups),
        rows(G.size(1) / groups), x(x), G(G), layout(sample_rows, channels, G, kernel, stride, dilation) {}

  int64_t size() const { return int64_t(layout.elements.size()); }
  int64_t positions() const { return int64_t(layout.places.size()); }

  // Rows of one sample.
  static int64_t check(const Tensor& x, const Tensor& G, int64_t batch, int64_t groups, const Integers& kernel,
                       const Integers& stride, const Integers& padding, const Integers& dilation) {
    for (const auto& [tensor, name] : {std::pair{&x, "x"}, std::pair{&G, "G"}}) {
      check_floats(*tensor, name);
      STD_TORCH_CHECK(tensor->dim() == 2 + AXES && type_of(*tensor) != Type::float64, "dpfast: ", name,
                      " must be [rows, channels, *] with three spatial dimensions and not float64");
    }
    check_sizes(kernel, "kernel", 1);
    check_sizes(stride, "stride", 1);
    check_sizes(padding, "padding", 0);
    check_sizes(dilation, "dilation", 1);
    STD_TORCH_CHECK(batch > 0 && x.size(0) == G.size(0) && x.size(0) % batch == 0,
                    "dpfast: batch must divide the rows of x and G, got ", batch);
    STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0 && G.size(1) % groups == 0,
                    "dpfast: groups must divide the channels of x and G, got ", groups);
    return x.size(0) / batch;
  }

  // f(sample, group), which are divided among the threads: `weight` is what one costs.
  template <class F>
  void each_unit(int64_t weight, const F& f) const {
    share(Integers(batch * groups, weight), [&](size_t unit) { f(int64_t(unit) / groups, int64_t(unit) % groups); });
  }

  // x of a sample and group, padded.
  void read_x(int64_t i, int64_t group, std::vector<float>& to) const {
    to.assign(sample_rows * channels * layout.outer, 0.0f);
    for (int64_t row = 0; row < sample_rows; ++row)
      for (int64_t c = 0; c < channels; ++c)
        layout.copy(x.data, x.type, ((i * sample_rows + row) * x.channels + group * channels + c) * x.line, x.size,
                    padding, to.data() + (row * channels + c) * layout.outer);
  }

  // f(position of the first, j, values): the backprops of a sample and group, a row of G and row j of weight at a time.
  template <class F>
  void read_G(int64_t i, int64_t group, std::vector<float>& scratch, const F& f) const {
    scratch.resize(G.line);
    for (int64_t row = 0; row < sample_rows; ++row)
      for (int64_t j = 0; j < rows; ++j) {
        const int64_t from = (i * sample_rows + row) * G.channels + group * rows + j;
        widen(G.data, G.type, from * G.line, G.line, scratch.data());
        f(row * G.line, j, scratch.data());
      }
  }
};

// g_i[e, j] = Σ_t patch_i,t[e] · G_i,t[j] of every sample i and ‖g_i‖²
std::tuple<Tensor, Tensor> convolution_grad_samples(Tensor x, Tensor G, int64_t batch, int64_t groups, Integers kernel,
                                                    Integers stride, Integers padding, Integers dilation) {
  const Convolution c(x, G, batch, groups, kernel, stride, padding, dilation);
  const int64_t all = G.size(1), size = c.size(), width = kernels().patch_gradient_width(c.rows);
  Tensor samples = make({batch, size, all}, ScalarType::Float, x), squared = make({batch}, ScalarType::Double, x);
  std::vector<double> squares(batch * groups);
  c.each_unit(c.positions() * size * c.rows, [&](int64_t i, int64_t group) {
    thread_local std::vector<float> padded, by_position, scratch;
    c.read_x(i, group, padded);
    by_position.assign(c.positions() * width, 0.0f);
    c.read_G(i, group, scratch, [&](int64_t first, int64_t j, const float* values) {
      for (int64_t t = 0; t < c.G.line; ++t) by_position[(first + t) * width + j] = values[t];
    });
    float* out = static_cast<float*>(samples.data_ptr()) + i * size * all + group * c.rows;
    squares[i * groups + group] =
        kernels().patch_gradient({padded.data(), c.layout.elements.data(), size, c.layout.places.data(), c.positions(),
                                  by_position.data(), width, c.rows, out, all});
  });
  for (int64_t i = 0; i < batch; ++i) {
    Sum sum;
    for (int64_t group = 0; group < groups; ++group) sum.add(squares[i * groups + group]);
    static_cast<double*>(squared.data_ptr())[i] = sum.total();
  }
  return {samples, squared};
}

// patch_t · patch_s is the sum over a window of products of pixels, which windows that overlap have in common: made once,
// they are as many times fewer as a window has pixels.
struct PixelProducts {
  const Convolution& c;
  Integers inside, number;  // the places that are no padding, and which of these a place is (-1: none)
  int64_t window, last;     // pixels of a window; the place of the last patch

  explicit PixelProducts(const Convolution& c)
      : c(c), number(c.layout.outer, -1), window(c.size() / c.channels),
        last(c.layout.places.empty() ? 0 : c.layout.places.back()) {
    const int64_t* sizes = c.layout.sizes;
    Layout::each(sizes, [&](int64_t z, int64_t y, int64_t x) {
      const int64_t at[AXES] = {z, y, x};
      for (int axis = 0; axis < AXES; ++axis)
        if (at[axis] < c.padding[axis] || at[axis] >= c.padding[axis] + c.x.size[axis]) return;
      const int64_t place = (z * sizes[1] + y) * sizes[2] + x;
      number[place] = int64_t(inside.size());
      inside.push_back(place);
    });
  }

  // Whether that is less work than products of patches, in strips of so many rows; and little enough to keep.
  bool serves(int64_t strip) const {
    const int64_t T = c.positions(), products = int64_t(inside.size()) * c.layout.outer;
    return c.sample_rows == 1 && products < (1 << 22) &&
           products * c.channels + 4 * T * window * last < T * (T + strip) / 2 * c.size();
  }

  // [inside, outer]: the product of each pixel with each place, over channels.
  void make(const std::vector<float>& padded, const Integers& channels, std::vector<float>& packed,
            std::vector<float>& to) const {
    const int64_t outer = c.layout.outer, width = kernels().patch_gradient_width(outer);
    packed.assign(c.channels * width, 0.0f);
    for (int64_t k = 0; k < c.channels; ++k) std::copy_n(padded.data() + k * outer, outer, packed.data() + k * width);
    to.resize(inside.size() * outer);
    kernels().patch_gradient({padded.data(), inside.data(), int64_t(inside.size()), channels.data(), c.channels,
                              packed.data(), width, outer, to.data(), outer});
  }

  // Of patches [begin, begin + height) with those from `begin` on.
  void add_up(const std::vector<float>& products, int64_t begin, int64_t height, std::vector<float>& line,
              float* to) const {
    const Integers& places = c.layout.places;
    line.resize(last + 1);
    for (int64_t t = begin; t < begin + height; ++t) {
      std::fill(line.begin(), line.end(), 0.0f);
      for (int64_t k = 0; k < window; ++k) {
        const int64_t offset = c.layout.elements[k], row = number[places[t] + offset];
        if (row < 0) continue;
        const float* from = products.data() + row * c.layout.outer + offset;
        for (int64_t q = places[begin]; q <= last; ++q) line[q] += from[q];
      }
      for (int64_t s = begin; s < c.positions(); ++s) *to++ = line[places[s]];
    }
  }
};

// Σ_{t,s} (patch_t · patch_s)(G_t · G_s) of every sample and group, the same of absolute values, Σ_t ‖patch_t‖,
// Σ_t ‖G_t‖ and Σ_t ‖patch_t‖ ‖G_t‖, of which error bounds are made.
Tensor convolution_ghost(Tensor x, Tensor G, int64_t batch, int64_t groups, Integers kernel, Integers stride,
                         Integers padding, Integers dilation) {
  constexpr double LOST = std::numeric_limits<float>::min();  // the most that a product loses to underflow
  constexpr int64_t STRIP = 36;  // rows of the Gram matrices at a time, of which only s >= t is made, and counted twice
  const Convolution c(x, G, batch, groups, kernel, stride, padding, dilation);
  const int64_t T = c.positions(), size = c.size(), width = kernels().patch_gradient_width(T);
  Tensor sums = make({5, batch, groups}, ScalarType::Double, x);
  Integers ascending(T), lines(c.rows);  // a Gram matrix is that of "patches" which are columns of what is multiplied
  for (int64_t t = 0; t < T; ++t) ascending[t] = t;
  for (int64_t j = 0; j < c.rows; ++j) lines[j] = j * width;
  const PixelProducts pixels(c);
  const bool by_pixels = pixels.serves(STRIP);
  Integers channels(c.channels);
  for (int64_t k = 0; k < c.channels; ++k) channels[k] = k * c.layout.outer;
  c.each_unit(T * T * (size + c.rows) / 2, [&](int64_t i, int64_t group) {
    thread_local std::vector<float> padded, packed, products, line, backprops, scratch, gram[2];
    c.read_x(i, group, padded);
    if (by_pixels) {
      pixels.make(padded, channels, packed, products);
    } else {
      packed.assign(size * width, 0.0f);
      float* to = packed.data();
      for (int64_t element : c.layout.elements) {
        c.layout.pack(padded.data() + element, to);
        to += width;
      }
    }
    backprops.assign(c.rows * width, 0.0f);
    c.read_G(i, group, scratch, [&](int64_t first, int64_t j, const float* values) {
      std::copy_n(values, c.G.line, backprops.data() + j * width + first);
    });
    double total[5] = {};
    for (int64_t begin = 0; begin < T; begin += STRIP) {
      const int64_t height = std::min(STRIP, T - begin), n = T - begin;
      for (auto& strip : gram) strip.resize(height * n);
      if (by_pixels)
        pixels.add_up(products, begin, height, line, gram[0].data());
      else
        kernels().patch_gradient({padded.data(), c.layout.places.data() + begin, height, c.layout.elements.data(), size,
                                  packed.data() + begin, width, n, gram[0].data(), n});
      kernels().patch_gradient({backprops.data(), ascending.data() + begin, height, lines.data(), c.rows,
                                backprops.data() + begin, width, n, gram[1].data(), n});
      const auto add = [&](int64_t first, int64_t count, double times) {
        double sum, absolute;
        kernels().product_sums(sum, absolute, gram[0].data() + first, gram[1].data() + first, Type::float32, count);
        total[0] += times * sum;
        total[1] += times * absolute;
      };
      if (n == height) add(0, height * height, 1);
      for (int64_t t = 0; t < height; ++t) {
        const float *a = gram[0].data() + t * n, *g = gram[1].data() + t * n;
        if (n > height) {
          add(t * n, height, 1);
          add(t * n + height, n - height, 2);
        }
        const double length_a = std::sqrt(a[t] + double(size) * LOST), length_g = std::sqrt(g[t] + double(c.rows) * LOST);
        total[2] += length_a;
        total[3] += length_g;
        total[4] += length_a * length_g;
      }
    }
    for (int k = 0; k < 5; ++k)
      static_cast<double*>(sums.data_ptr())[(k * batch + i) * groups + group] = total[k];
  });
  return sums;
}

}  // namespace
}  // namespace dpfast

STABLE_TORCH_LIBRARY_IMPL(dpfast, CPU, library) {
  library.impl("convolution_grad_samples", TORCH_BOX(&dpfast::convolution_grad_samples));
  library.impl("convolution_ghost", TORCH_BOX(&dpfast::convolution_ghost));
}
