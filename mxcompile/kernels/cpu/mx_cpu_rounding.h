// Rounding to MX formats, as reference.py does it, bit for bit.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "mx_cpu.h"
#include "mx_cpu_elements.h"

namespace {

// Round the values of a block to the nearest elements, as reference.py does; returns the block's scale.
template <class E, int B>
inline float to_elements(float* values, const Rounding& rounding) {
  uint32_t amax = 0;
  for (int i = 0; i < B; ++i) {
    const uint32_t magnitude = to_bits(values[i]) & 0x7fffffffu;
    amax = magnitude > amax ? magnitude : amax;
  }
  if (amax >= 0x7f800000u) {
    for (int i = 0; i < B; ++i) values[i] = 0.0f;
    return NAN;
  }
  int exponent;
  const float mantissa = std::frexp(from_bits(amax), &exponent);
  exponent += -1 - E::EMAX + (rounding.or_equal ? mantissa >= rounding.threshold : mantissa > rounding.threshold);
  exponent = exponent < -EXPONENT_BIAS ? -EXPONENT_BIAS : exponent;
  exponent = exponent > rounding.largest - E::EMAX ? rounding.largest - E::EMAX : exponent;
  const float down = power_of_two(-exponent);
  if constexpr (E::INTEGER) {
    constexpr float STEPS = exact_power(E::MANTISSA_BITS), MOST = float(E::MAX_CODE);
    for (int i = 0; i < B; ++i) {
      float steps = ((values[i] * down) * STEPS + MAGIC) - MAGIC;
      steps = steps > MOST ? MOST : steps;
      steps = steps < -MOST ? -MOST : steps;
      values[i] = (steps + 0.0f) * (1.0f / STEPS);
    }
  } else {
    constexpr int LOW = E::EMIN + EXPONENT_BIAS, HIGH = E::EMAX + EXPONENT_BIAS;
    constexpr uint32_t MASK = (1u << E::MANTISSA_BITS) - 1;
    constexpr float MOST = (1.0f + float(E::MAX_CODE & MASK) * exact_power(-E::MANTISSA_BITS)) * exact_power(E::EMAX);
    for (int i = 0; i < B; ++i) {
      const float v = values[i] * down;
      int e = int((to_bits(v) >> 23) & 255u);
      e = e < LOW ? LOW : e;
      e = e > HIGH ? HIGH : e;
      const float shift = from_bits(uint32_t(e + 23 - E::MANTISSA_BITS) << 23) * 1.5f;
      float rounded = (v + shift) - shift;
      rounded = rounded > MOST ? MOST : rounded;
      rounded = rounded < -MOST ? -MOST : rounded;
      values[i] = std::copysign(rounded, v);
    }
  }
  return power_of_two(exponent);
}

// Load up to B values and zero the rest.
template <int B, class From>
inline void load_block(const From* from, int64_t count, float* values) {
  if (count >= B) {
    for (int i = 0; i < B; ++i) values[i] = load(from, i);
  } else {
    for (int i = 0; i < B; ++i) values[i] = i < count ? load(from, i) : 0.0f;
  }
}

// Round one row, with the result rounded to the input type; `to` may be wider.
template <class E, int B, class From, class To>
void round_row(const From* from, To* to, int64_t size, const Rounding& rounding) {
  for (int64_t start = 0; start < size; start += B) {
    float values[B];
    load_block<B>(from + start, size - start, values);
    const float scale = to_elements<E, B>(values, rounding);
    for (int i = 0; i < B; ++i) values[i] *= scale;
    if constexpr (sizeof(From) < sizeof(To))
      for (int i = 0; i < B; ++i) values[i] = from_bits(uint32_t(to_bfloat16(values[i])) << 16);
    if (size - start >= B) {
      for (int i = 0; i < B; ++i) store(to, start + i, values[i]);
    } else {
      for (int64_t i = 0; i < size - start; ++i) store(to, start + i, values[i]);
    }
  }
}

template <class E, int B, class T>
void round_rows(const void* from, void* to, int64_t rows, int64_t size, const Rounding& rounding, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    round_row<E, B>(static_cast<const T*>(from) + row * size, static_cast<T*>(to) + row * size, size, rounding);
}

// Call `function` with a value of the element type of this index; with nullptr for -1.
template <class F>
void with_element(int index, const F& function) {
  switch (index) {
    case 0: return function(Int8{});
    case 1: return function(Int6{});
    case 2: return function(Int4{});
    case 3: return function(E4M3{});
    case 4: return function(E5M2{});
    case 5: return function(E3M2{});
    case 6: return function(E2M3{});
    case 7: return function(E2M1{});
    default: return function(nullptr);
  }
}

}  // namespace
