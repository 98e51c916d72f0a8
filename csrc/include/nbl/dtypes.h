// The element types of weights and activations, without torch: plain bits and their conversions.
#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC has no standard headers, and needs none
using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#include <cstring>
#endif

#if defined(__CUDACC__)
#define NBL_HOST_DEVICE __host__ __device__
#else
#define NBL_HOST_DEVICE
#endif

namespace nbl {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// 1 sign, 4 exponent (bias 7) and 3 fraction bits; up to 448, no infinity, NaN is S.1111.111
struct float8_e4m3 {
  uint8_t bits;
};

// 128 consecutive weights of a row: the low nibble of 16-bit word j (little-endian) is weight j,
// the next one weight 32 + j, then 64 + j and 96 + j. A weight is (nibble - 8) · scale.
struct int4_group {
  uint8_t bytes[64];
};

constexpr int64_t kInt4Group = 128;

enum class DType { kFloat32, kBFloat16, kFloat16 };

// How the weight (n, k) of a linear is stored. Sums are scaled in float32.
enum class WeightFormat {
  kPlain,  // in the dtype of the activations
  kInt8,   // int8_t (n, k); a float32 scale per row
  kFp8,    // float8_e4m3 (n, k); a float32 scale per row
  kInt4,   // int4_group (n, ceil(k / 128)), nibble 8 past k; a bfloat16 scale per group
};

NBL_HOST_DEVICE inline float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

NBL_HOST_DEVICE inline uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

NBL_HOST_DEVICE inline float to_float(float value) { return value; }

NBL_HOST_DEVICE inline float to_float(bfloat16 value) {
  return bits_to_float(uint32_t{value.bits} << 16);
}

NBL_HOST_DEVICE inline float to_float(float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));
  if (magnitude < 0x0400u) {  // subnormal: that many 2^-24, exactly
    const float value = static_cast<float>(magnitude) * bits_to_float(0x33800000u);
    return bits_to_float(sign | float_to_bits(value));
  }
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));  // exponent bias 15 to 127
}

NBL_HOST_DEVICE inline float to_float(int8_t value) { return static_cast<float>(value); }

NBL_HOST_DEVICE inline float to_float(float8_e4m3 value) {
  const uint32_t sign = uint32_t{value.bits & 0x80u} << 24;
  const uint32_t magnitude = value.bits & 0x7fu;
  if (magnitude == 0x7fu) return bits_to_float(sign | 0x7fc00000u);
  if (magnitude < 0x08u) {  // subnormal: that many 2^-9
    const float value = static_cast<float>(magnitude) * bits_to_float(0x3b000000u);
    return bits_to_float(sign | float_to_bits(value));
  }
  return bits_to_float(sign | ((magnitude << 20) + 0x3c000000u));  // exponent bias 7 to 127
}

// Weight i of a group, as an integer from -8 to 7.
NBL_HOST_DEVICE inline int int4_at(const int4_group& group, int i) {
  const int nibble = i / 32, byte = 2 * (i % 32) + nibble / 2;
  return ((group.bytes[byte] >> (4 * (nibble % 2))) & 15) - 8;
}

template <class T>
NBL_HOST_DEVICE T from_float(float value);

template <>
NBL_HOST_DEVICE inline float from_float<float>(float value) {
  return value;
}

template <>  // round to nearest, ties to even; NaN stays NaN
NBL_HOST_DEVICE inline bfloat16 from_float<bfloat16>(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>  // round to nearest, ties to even; NaN stays NaN, overflow becomes infinity
NBL_HOST_DEVICE inline float16 from_float<float16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (magnitude < 0x38800000u) {  // subnormal in half: adding 0.5 rounds at its last place, 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace nbl
