// Elements of the formats: their bit layouts, and decoding of packed blocks (the layout of packing.py) to float32.
//
// Loops over the elements of a block have fixed length, so that the compiler vectorizes them for the machine it builds for.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "mx_cpu_values.h"

namespace {

constexpr int EXPONENT_BIAS = 127;

// Bit layouts of elements, with the parameters of formats.py.
template <int BITS_, int EXPONENT_BITS_, int MANTISSA_BITS_, int EMIN_, int EMAX_, int MAX_CODE_>
struct Element {
  static constexpr int BITS = BITS_, EXPONENT_BITS = EXPONENT_BITS_, MANTISSA_BITS = MANTISSA_BITS_;
  static constexpr int EMIN = EMIN_, EMAX = EMAX_, MAX_CODE = MAX_CODE_;
  static constexpr bool INTEGER = EXPONENT_BITS == 0;
};
using Int8 = Element<8, 0, 6, 0, 0, 127>;
using Int6 = Element<6, 0, 4, 0, 0, 31>;
using Int4 = Element<4, 0, 2, 0, 0, 7>;
using E4M3 = Element<8, 4, 3, -6, 8, 126>;
using E5M2 = Element<8, 5, 2, -14, 15, 123>;
using E3M2 = Element<6, 3, 2, -2, 4, 31>;
using E2M3 = Element<6, 2, 3, 0, 2, 31>;
using E2M1 = Element<4, 2, 1, 0, 2, 7>;

constexpr float exact_power(int exponent) {
  return exponent < 0 ? 1.0f / float(1 << -exponent) : float(1 << exponent);
}

// 2^exponent, for exponents of -149 and above.
inline float power_of_two(int exponent) {
  return exponent > -EXPONENT_BIAS ? from_bits(uint32_t(exponent + EXPONENT_BIAS) << 23)
                                   : from_bits(1u << (exponent + 149));
}

// SIMD vectors of `N` values. (GCC requires literal vector sizes.)
template <int N>
struct Lanes;

#define MX_LANES(N)                                           \
  template <>                                                 \
  struct Lanes<N> {                                           \
    typedef uint8_t Bytes __attribute__((vector_size(N)));    \
    typedef int32_t Ints __attribute__((vector_size(4 * N))); \
    typedef float Floats __attribute__((vector_size(4 * N))); \
  };
MX_LANES(4)
MX_LANES(8)
MX_LANES(16)

// Values in the widest vector that the processor has; vectors of two registers spill.
#if defined(__AVX512F__)
constexpr int WIDEST = 16;
#elif defined(__AVX2__)
constexpr int WIDEST = 8;
#else
constexpr int WIDEST = 4;
#endif

template <int N>
inline typename Lanes<N>::Ints load_bytes(const uint8_t* from) {
  int32_t wide[N];
  for (int i = 0; i < N; ++i) wide[i] = from[i];
  typename Lanes<N>::Ints values;
  std::memcpy(&values, wide, sizeof values);
  return values;
}

template <int N>
inline typename Lanes<N>::Floats load_floats(const float* from) {
  typename Lanes<N>::Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

// The value of every scale byte, for elements decoded by `decode`.
template <class E>
struct Scales {
  float values[256];
  Scales() {
    const float unit = E::INTEGER ? exact_power(-E::MANTISSA_BITS) : 1.0f;
    for (int byte = 0; byte < 255; ++byte) values[byte] = power_of_two(byte - EXPONENT_BIAS) * unit;
    values[255] = NAN;
  }
};
template <class E>
const Scales<E> SCALES;

// Codes to values; integers stay in units of their step, which `Scales` accounts for.
template <class E, int N>
inline typename Lanes<N>::Floats decode(typename Lanes<N>::Ints codes) {
  using Ints = typename Lanes<N>::Ints;
  using Floats = typename Lanes<N>::Floats;
  constexpr int32_t SIGN = 1 << (E::BITS - 1);
#if defined(__AVX2__) && defined(__GNUC__) && !defined(__clang__)
  if constexpr (std::is_same_v<E, E2M1> && N == WIDEST) {  // all values, or all magnitudes, fit in one register
    if constexpr (N == 16) {
      const Floats values = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};
      return __builtin_shuffle(values, codes);
    } else {
      const Floats magnitudes = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
      return (Floats)((Ints)__builtin_shuffle(magnitudes, codes) | ((codes & SIGN) << (32 - E::BITS)));
    }
  }
#endif
  if constexpr (E::INTEGER) {
    return __builtin_convertvector((codes ^ SIGN) - SIGN, Floats);
  } else {
    constexpr int BIAS = E::EMIN - 1 + EXPONENT_BIAS;
    constexpr float SMALLEST = exact_power(E::EMIN - E::MANTISSA_BITS);
    const Ints magnitude = codes & (SIGN - 1);
    const Ints small = (Ints)(__builtin_convertvector(magnitude, Floats) * SMALLEST);
    const Ints large = (magnitude << (23 - E::MANTISSA_BITS)) + (BIAS << 23);
    Ints bits = magnitude < (1 << E::MANTISSA_BITS) ? small : large;
    if constexpr (E::BITS == 8) {
      const Ints nan = Ints{} + 0x7fc00000, infinite = Ints{} + 0x7f800000;
      bits = magnitude > E::MAX_CODE ? nan : bits;
      if constexpr (E::EXPONENT_BITS == 5) bits = magnitude == E::MAX_CODE + 1 ? infinite : bits;
    }
    return (Floats)(bits | ((codes & SIGN) << (32 - E::BITS)));
  }
}

// The `B` elements of one block, times its scale.
template <class E, int B>
inline void decode_block(const uint8_t* packed, float scale, float* values) {
  constexpr int RUN = E::BITS == 8 ? B : E::BITS == 4 ? B / 2 : B / 4, N = RUN < WIDEST ? RUN : WIDEST;
  const auto put = [&](int at, typename Lanes<N>::Ints codes) {
    const auto decoded = decode<E, N>(codes) * scale;
    std::memcpy(values + at, &decoded, sizeof decoded);
  };
  if constexpr (E::BITS == 8) {
    for (int i = 0; i < B; i += N) put(i, load_bytes<N>(packed + i));
  } else if constexpr (E::BITS == 4) {
    for (int i = 0; i < B / 2; i += N) {
      const auto pairs = load_bytes<N>(packed + i);
      put(i, pairs & 15);
      put(B / 2 + i, pairs >> 4);
    }
  } else {
    for (int i = 0; i < B / 4; i += N) {
      const auto first = load_bytes<N>(packed + i), second = load_bytes<N>(packed + B / 4 + i);
      const auto high = load_bytes<N>(packed + B / 2 + i);
      put(i, (first & 15) | ((high & 3) << 4));
      put(B / 4 + i, (second & 15) | ((high & 12) << 2));
      put(B / 2 + i, (first >> 4) | (high & 48));
      put(3 * B / 4 + i, (second >> 4) | ((high & 192) >> 2));
    }
  }
}

// Decode one row of a weight to `size` values.
template <class E, int B, class T>
void decode_row(const uint8_t* packed, const uint8_t* scales, T* values, int64_t size) {
  constexpr int64_t BYTES = B * E::BITS / 8;
  for (int64_t start = 0, block = 0; start < size; start += B, ++block) {
    float decoded[B];
    decode_block<E, B>(packed + block * BYTES, SCALES<E>.values[scales[block]], decoded);
    if (start + B <= size) {
      for (int i = 0; i < B; ++i) store(values, start + i, decoded[i]);
    } else {
      for (int64_t i = 0; i < size - start; ++i) store(values, start + i, decoded[i]);
    }
  }
}

}  // namespace
