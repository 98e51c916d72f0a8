// One vector of floats per instruction set: the few operations the CPU kernels are written in.
//
// Each kernels_<isa>.cpp defines NBL_ISA (the namespace everything lands in) and one of NBL_AVX512,
// NBL_AVX2 (or none: the portable version, which compilers vectorize for any processor), plus
// NBL_AVX512_BF16 where the processor multiplies bf16 pairs itself. The instruction set is switched
// on by a target pragma after the standard headers, so that no inline function of the standard
// library is compiled for a processor that the program may not run on. (GCC does not apply the
// pragma to friends defined in a class: the operators stand outside.)
#pragma once

#include "../dtypes.h"

namespace nbl {
namespace NBL_ISA {

#if defined(NBL_AVX512)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bfloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Vec load(const float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
  }
  static Vec load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
  }
  static Vec load(const float8_e4m3* p) {  // as to_float
    // Its bits are those of a float16 2^8 times smaller, subnormals included, but for NaN.
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
    __m256i bits = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbf80));
    const __m256i negative = _mm256_or_si256(bits, _mm256_set1_epi16((short)0x8000));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(negative, _mm256_set1_epi16((short)0xbf80));
    bits = _mm256_mask_add_epi16(bits, nan, bits, _mm256_set1_epi16(0x4000));
    return {_mm512_mul_ps(_mm512_cvtph_ps(bits), _mm512_set1_ps(256.0f))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bfloat16* p) const {
#if defined(NBL_AVX512_BF16)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
    store_each(p);
#endif
  }
  void store(float16* p) const {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void add_to(double* p) const {  // p[0..15] += v
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), low));
    _mm512_storeu_pd(p + 8, _mm512_add_pd(_mm512_loadu_pd(p + 8), high));
  }
  template <class T>
  void store_each(T* p) const {  // the compiler vectorizes the rounding
    alignas(64) float each[kWidth];
    store(each);
    for (int i = 0; i < kWidth; ++i) p[i] = from_float<T>(each[i]);
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

#elif defined(NBL_AVX2)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float a) { return {_mm256_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bfloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vec load(const float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
  }
  static Vec load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
  }
  static Vec load(const float8_e4m3* p) {  // as to_float
    // Its bits are those of a float16 2^8 times smaller, subnormals included, but for NaN.
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
    __m128i bits = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((short)0xbf80));
    const __m128i negative = _mm_or_si128(bits, _mm_set1_epi16((short)0x8000));
    const __m128i nan = _mm_cmpeq_epi16(negative, _mm_set1_epi16((short)0xbf80));
    bits = _mm_add_epi16(bits, _mm_and_si128(nan, _mm_set1_epi16(0x4000)));
    return {_mm256_mul_ps(_mm256_cvtph_ps(bits), _mm256_set1_ps(256.0f))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bfloat16* p) const { store_each(p); }
  void store(float16* p) const {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void add_to(double* p) const {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    _mm256_storeu_pd(p, _mm256_add_pd(_mm256_loadu_pd(p), low));
    _mm256_storeu_pd(p + 4, _mm256_add_pd(_mm256_loadu_pd(p + 4), high));
  }
  template <class T>
  void store_each(T* p) const {  // the compiler vectorizes the rounding
    alignas(32) float each[kWidth];
    store(each);
    for (int i = 0; i < kWidth; ++i) p[i] = from_float<T>(each[i]);
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

#else

struct Vec {  // plain loops of a fixed length
  static constexpr int kWidth = 8;
  float v[kWidth];

  static Vec zero() { return broadcast(0.0f); }
  static Vec broadcast(float a) {
    Vec r;
    for (float& x : r.v) x = a;
    return r;
  }
  template <class T>
  static Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = from_float<T>(v[i]);
  }
  void add_to(double* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] += v[i];
  }
  float sum() const {
    float s[kWidth / 2];
    for (int i = 0; i < kWidth / 2; ++i) s[i] = v[i] + v[i + kWidth / 2];
    return (s[0] + s[2]) + (s[1] + s[3]);
  }
  template <class Op>
  static Vec zip(const Vec& a, const Vec& b, Op op) {
    Vec r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = op(a.v[i], b.v[i]);
    return r;
  }
};

inline Vec operator+(const Vec& a, const Vec& b) {
  return Vec::zip(a, b, [](float x, float y) { return x + y; });
}
inline Vec operator-(const Vec& a, const Vec& b) {
  return Vec::zip(a, b, [](float x, float y) { return x - y; });
}
inline Vec operator*(const Vec& a, const Vec& b) {
  return Vec::zip(a, b, [](float x, float y) { return x * y; });
}
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) { return a * b + c; }

#endif

// Reads the first `count` (< kWidth) elements at p and zeros: never touches memory past the end.
template <class T>
inline Vec load_partial(const T* p, int64_t count) {
  T padded[Vec::kWidth] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return Vec::load(padded);
}

// Writes the first `count` (< kWidth) elements.
template <class T>
inline void store_partial(Vec v, T* p, int64_t count) {
  T padded[Vec::kWidth];
  v.store(padded);
  std::memcpy(p, padded, count * sizeof(T));
}

// The same for any count: whole vectors as they are.
template <class T>
inline Vec load_some(const T* p, int64_t count) {
  return count >= Vec::kWidth ? Vec::load(p) : load_partial(p, count);
}

template <class T>
inline void store_some(Vec v, T* p, int64_t count) {
  count >= Vec::kWidth ? v.store(p) : store_partial(v, p, count);
}

// e^x to about one unit in the last place, without branches so that loops over it vectorize:
// x = n ln 2 + r, |r| <= ln 2 / 2, a Taylor polynomial in r, and n added to the exponent.
inline float exp_f32(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.44269504f + shift) - shift;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return bits_to_float(float_to_bits(p) + (static_cast<uint32_t>(static_cast<int32_t>(n)) << 23));
}

inline float silu(float x) { return x / (1.0f + exp_f32(-x)); }

}  // namespace NBL_ISA
}  // namespace nbl
