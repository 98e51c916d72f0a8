// Quantized weights on their way into products: of 16 bytes from memory, eight consecutive weights
// become T, bfloat16 or float16, in pairs as mma takes them. Every one is exact; scales come later.
//
//   widen<T>(int8_t {}, bytes, part)         weights 8 part … 8 part + 7 of the 16
//   widen<T>(float8_e4m3 {}, bytes, part)    the same; NaN stays NaN
//   widen<T>(int4_group {}, bytes, part)     of 16 bytes from byte 16 t of a group on: weights
//                                            32 part + 8 t … 32 part + 8 t + 7 of the group
//
// This has to keep up with memory, at 1 to 3 instructions a weight. An integer takes its place
// among the low bits of a number whose lowest bit counts 1 (1024 in float16, 128 in bfloat16);
// that number is subtracted again. The bits of an e4m3 number are shifted to where T has its
// exponent and fraction; the difference of the exponents' biases is multiplied in, which also puts
// subnormal numbers right.
#pragma once

#include "nbl/cuda/ptx.cuh"

namespace nbl {

// What pointers to weights count in.
template <class W>
struct StoredAs {
  using Element = W;
};
template <>
struct StoredAs<int8_t> {
  using Element = uint8_t;
};
template <>
struct StoredAs<float8_e4m3> {
  using Element = uint8_t;
};
template <>
struct StoredAs<int4_group> {
  using Element = uint8_t;
};

// Numbers of type T, twice in a word.
template <class T>
struct Twice;
template <>
struct Twice<float16> {
  static constexpr uint32_t kOne = 0x3c003c00;
  static constexpr uint32_t k1024 = 0x64006400, kMinus1032 = 0xe408e408, kMinus1152 = 0xe480e480;
  static constexpr uint32_t k256 = 0x5c005c00;
  NBL_DEVICE static uint32_t of_halves(uint32_t halves) { return halves; }
};
template <>
struct Twice<bfloat16> {
  static constexpr uint32_t kOne = 0x3f803f80, kMinusOne = 0xbf80bf80;
  static constexpr uint32_t k128 = 0x43004300, kMinus136 = 0xc308c308;
  static constexpr uint32_t k2To120 = 0x7b807b80;
  NBL_DEVICE static uint32_t of_halves(uint32_t halves) {
    const Float2 floats = unpack2<float16>(halves);
    return pack2<bfloat16>(floats.lo, floats.hi);
  }
};

// ---- A pair of int8: bytes 0 and 1 of a word, or 2 and 3 ---------------------------------------

template <class T>
NBL_DEVICE uint32_t widen_int8(uint32_t word, int pair);

template <>
NBL_DEVICE uint32_t widen_int8<float16>(uint32_t word, int pair) {
  // 1024 + (weight + 128)
  const uint32_t numbers =
      byte_permute(word ^ 0x80808080u, Twice<float16>::k1024, pair ? 0x5352 : 0x5150);
  return fma2<float16>(numbers, Twice<float16>::kOne, Twice<float16>::kMinus1152);
}

template <>
NBL_DEVICE uint32_t widen_int8<bfloat16>(uint32_t word, int pair) {
  // Only 7 bits count ones; the sign is the exponent's lowest bit and makes 256 of 128. So the
  // weight is 128 + (7 bits), less 128 or 256.
  const uint32_t numbers = byte_permute(word, Twice<bfloat16>::k128, pair ? 0x5352 : 0x5150);
  return fma2<bfloat16>(numbers & 0xff80ff80u, Twice<bfloat16>::kMinusOne, numbers & 0xff7fff7fu);
}

// ---- The same of fp8 ---------------------------------------------------------------------------

// Two e4m3 numbers in the high bytes of their halves, but for NaN.
template <class T>
NBL_DEVICE uint32_t shift_fp8(uint32_t halves);

template <>
NBL_DEVICE uint32_t shift_fp8<float16>(uint32_t halves) {
  const uint32_t numbers = (halves & 0x80008000u) | (halves >> 1 & 0x3f803f80u);
  return fma2<float16>(numbers, Twice<float16>::k256, 0x80008000u);
}

template <>
NBL_DEVICE uint32_t shift_fp8<bfloat16>(uint32_t halves) {
  const uint32_t numbers = (halves & 0x80008000u) | (halves >> 4 & 0x07f007f0u);
  return fma2<bfloat16>(numbers, Twice<bfloat16>::k2To120, 0x80008000u);
}

// The sign bit is off in some byte of the result if and only if some byte is NaN, ±1111.111.
NBL_DEVICE uint32_t signs_unless_nan(uint32_t word) { return (word | 0x80808080u) + 0x01010101u; }

template <class T>
NBL_DEVICE uint32_t widen_fp8(uint32_t word, int pair) {
  if constexpr (kHasFp8Conversion) {
    return Twice<T>::of_halves(fp8_to_half2(pair ? word >> 16 : word));
  } else {
    return shift_fp8<T>(byte_permute(word, 0, pair ? 0x3424 : 0x1404));
  }
}

// ---- A pair of int4: bits 0 to 3 and 16 to 19 of a word ----------------------------------------

template <class T>
NBL_DEVICE uint32_t widen_int4(uint32_t word);

template <>
NBL_DEVICE uint32_t widen_int4<float16>(uint32_t word) {
  using Pair = Twice<float16>;
  return fma2<float16>(and_or(word, 0x000f000fu, Pair::k1024), Pair::kOne, Pair::kMinus1032);
}

template <>
NBL_DEVICE uint32_t widen_int4<bfloat16>(uint32_t word) {
  using Pair = Twice<bfloat16>;
  return fma2<bfloat16>(and_or(word, 0x000f000fu, Pair::k128), Pair::kOne, Pair::kMinus136);
}

// ---- Eight weights -----------------------------------------------------------------------------

template <class T>  // not quantized
NBL_DEVICE Bytes16 widen(T, const Bytes16& bytes, int) {
  return bytes;
}

template <class T>
NBL_DEVICE Bytes16 widen(int8_t, const Bytes16& bytes, int part) {
  Bytes16 wide;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    wide.word[i] = widen_int8<T>(bytes.word[2 * part + i / 2], i % 2);
  }
  return wide;
}

template <class T>
NBL_DEVICE Bytes16 widen(float8_e4m3, const Bytes16& bytes, int part) {
  const uint32_t words[2] = {bytes.word[2 * part], bytes.word[2 * part + 1]};
  Bytes16 wide;
#pragma unroll
  for (int i = 0; i < 4; ++i) wide.word[i] = widen_fp8<T>(words[i / 2], i % 2);
  if constexpr (!kHasFp8Conversion) {
    const uint32_t signs = signs_unless_nan(words[0]) & signs_unless_nan(words[1]);
    if ((signs & 0x80808080u) != 0x80808080u) {  // hardly ever
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = words[i / 2] >> (i % 2 * 16);
        if ((pair & 0x7fu) == 0x7fu) wide.word[i] |= 0x00007fffu;
        if ((pair & 0x7f00u) == 0x7f00u) wide.word[i] |= 0x7fff0000u;
      }
    }
  }
  return wide;
}

template <class T>
NBL_DEVICE Bytes16 widen(int4_group, const Bytes16& bytes, int part) {
  Bytes16 wide;
#pragma unroll
  for (int i = 0; i < 4; ++i) wide.word[i] = widen_int4<T>(bytes.word[i] >> (4 * part));
  return wide;
}

}  // namespace nbl
