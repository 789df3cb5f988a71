// The noise of csrc/include/dpfast as a program, built once for each instruction set. Numbers are hexadecimal.
//
//   philox k0 k1 c0 c1 c2 c3              a line for each lane L: the four words of counter (c0 + L, c1, c2, c3)
//   chacha k0 ... k7 counter n0 n1 n2     a line for each lane L: the 16 words of block counter + L
//   normals k0 ... k7 step parameter start stop           float32, little-endian, to stdout: z of the elements
//   integers k0 ... k7 step parameter start stop scale    int32, K of the elements; scale is the bits of a float32
//   polar                                 pairs of words (w, a) on stdin → radius, x, y on stdout, all binary
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "dpfast/noise.h"

using namespace dpfast::DPFAST_ISA;

static uint64_t number(const char* text) { return std::strtoull(text, nullptr, 16); }

template <class Element, class Lanes>
static void store(Element* out, const Lanes& lanes) {
  memcpy(out, &lanes, sizeof(Lanes));
}

// Write the elements start ... stop - 1; tile(out, first element) makes TILE of them, first a multiple of TILE.
template <class Element, class Tile>
static void put_range(uint64_t start, uint64_t stop, const Tile& tile) {
  std::vector<Element> all((stop - start / TILE * TILE) / TILE * TILE + TILE);
  for (uint64_t e = start / TILE * TILE; e < stop; e += TILE) tile(all.data() + (e - start / TILE * TILE), e);
  fwrite(all.data() + start % TILE, sizeof(Element), stop - start, stdout);
}

static void philox(char** text) {
  uint32_t word[6];
  for (int i = 0; i < 6; ++i) word[i] = uint32_t(number(text[i]));
  constexpr int lanes = sizeof(u64) / 8;
  uint64_t counter[lanes], out[4][lanes];
  for (int lane = 0; lane < lanes; ++lane) counter[lane] = uint64_t(word[2]) + lane;
  // Two at a time, as fast_words asks for them: the second is the one that counts.
  u64 x[2][4] = {{}, {load<u64>(counter), splat(uint64_t(word[3])), splat(uint64_t(word[4])), splat(uint64_t(word[5]))}};
  philox4x32_10<2>(x, word[0], word[1]);
  for (int i = 0; i < 4; ++i) store(out[i], x[1][i]);
  for (int lane = 0; lane < lanes; ++lane)
    printf("%08x %08x %08x %08x\n", uint32_t(out[0][lane]), uint32_t(out[1][lane]), uint32_t(out[2][lane]),
           uint32_t(out[3][lane]));
}

static void chacha(char** text) {
  uint32_t word[12], counter[W], out[16][W];
  for (int i = 0; i < 12; ++i) word[i] = uint32_t(number(text[i]));
  for (int lane = 0; lane < W; ++lane) counter[lane] = word[8] + lane;
  u32 x[16];
  chacha20_block(x, word, load<u32>(counter), word + 9);
  for (int i = 0; i < 16; ++i) store(out[i], x[i]);
  for (int lane = 0; lane < W; ++lane)
    for (int i = 0; i < 16; ++i) printf("%08x%c", out[i][lane], i == 15 ? '\n' : ' ');
}

static void range(bool secure, char** text) {
  Stream stream{};
  for (int i = 0; i < 8; ++i) stream.key[i] = uint32_t(number(text[i]));
  stream.step = uint32_t(number(text[8])), stream.parameter = uint32_t(number(text[9]));
  const uint64_t start = number(text[10]), stop = number(text[11]);
  if (secure) {
    const float scale = bits_as<float>(uint32_t(number(text[12])));
    put_range<int32_t>(start, stop, [&](int32_t* out, uint64_t e) {
      for (int block = 0; block < 16; block += W) {
        i32 K[2][4];
        secure_integers(K, stream, uint32_t(e / 8 + block), scale);
        for (int half = 0; half < 2; ++half)
          for (int m = 0; m < 4; ++m) store(out + 64 * half + 4 * block + m * W, K[half][m]);
      }
    });
  } else {
    constexpr int N = W == 1 ? 1 : 2;
    put_range<float>(start, stop, [&](float* out, uint64_t e) {
      for (int n = 0; n < TILE; n += 4 * N * W) {
        f32 z[N][4];
        fast_normals<N>(z, stream, (e + n) / 4);
        for (int m = 0; m < 4 * N; ++m) store(out + n + m * W, z[m / 4][m % 4]);
      }
    });
  }
}

static void polar_of_stdin() {
  uint32_t in[2 * W];
  std::vector<float> out;
  while (fread(in, sizeof(in), 1, stdin) == 1) {
    uint32_t w[W], a[W];
    for (int lane = 0; lane < W; ++lane) w[lane] = in[2 * lane], a[lane] = in[2 * lane + 1];
    const Polar p = polar(load<u32>(w), load<u32>(a));
    float radius[W], x[W], y[W];
    store(radius, p.radius), store(x, p.x), store(y, p.y);
    for (int lane = 0; lane < W; ++lane) out.insert(out.end(), {radius[lane], x[lane], y[lane]});
  }
  fwrite(out.data(), sizeof(float), out.size(), stdout);
}

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "philox" && argc == 8)
    philox(argv + 2);
  else if (what == "chacha" && argc == 14)
    chacha(argv + 2);
  else if (what == "normals" && argc == 14)
    range(false, argv + 2);
  else if (what == "integers" && argc == 15)
    range(true, argv + 2);
  else if (what == "polar")
    polar_of_stdin();
  else
    return 2;
}
