// ChaCha20 (RFC 8439, section 2.3).
#pragma once

#include "lanes.h"

namespace dpfast::DPFAST_ISA {

DPFAST_FN void quarter_round(u32& a, u32& b, u32& c, u32& d) {
  a += b, d = rotate<16>(d ^ a);
  c += d, b = rotate<12>(b ^ c);
  a += b, d = rotate<8>(d ^ a);
  c += d, b = rotate<7>(b ^ c);
}

// The block function: 16 words from an 8-word key, a block counter (a lane each) and a 3-word nonce.
DPFAST_FN void chacha20_block(u32 x[16], const uint32_t key[8], u32 counter, const uint32_t nonce[3]) {
  const uint32_t constants[4] = {0x61707865, 0x3320646E, 0x79622D32, 0x6B206574};
  for (int i = 0; i < 4; ++i) x[i] = splat(constants[i]);
  for (int i = 0; i < 8; ++i) x[4 + i] = splat(key[i]);
  x[12] = counter;
  for (int i = 0; i < 3; ++i) x[13 + i] = splat(nonce[i]);
  DPFAST_NO_UNROLL
  for (int i = 0; i < 10; ++i) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
  }
  for (int i = 0; i < 4; ++i) x[i] += splat(constants[i]);
  for (int i = 0; i < 8; ++i) x[4 + i] += splat(key[i]);
  x[12] += counter;
  for (int i = 0; i < 3; ++i) x[13 + i] += splat(nonce[i]);
}

}  // namespace dpfast::DPFAST_ISA
