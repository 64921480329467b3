// The gated activation between the two matmuls of an expert, as numerics/gates.py defines it: f(gate) * (up + shift).
//
// Arithmetic is float32; bfloat16 results are rounded after each step, as torch rounds them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "mx_cpu_values.h"

// function: index in `with_gate_function`. limit: infinity for none.
struct Gate {
  int function;
  float alpha;
  float limit;
  float shift;
  int interleaved;
};

namespace {

// exp(x) within 2 units of the last place, in operations that the compiler vectorizes; NaN stays NaN.
inline float exponential(float x) {
  const float bounded = x > 89.0f ? 89.0f : x < -104.0f ? -104.0f : x;
  const float steps = (bounded * 1.44269504f + MAGIC) - MAGIC;
  const float r = (bounded - steps * 0.693359375f) + steps * 2.12194440e-4f;  // ln 2 in two parts
  float sum = 1.9875691500e-4f;
  sum = sum * r + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  const float mantissa = sum * r * r + r + 1.0f;
  const int32_t exponent = int32_t(steps == steps ? steps : 0.0f), half = exponent >> 1;
  // Two factors: 2^128 and 2^-150 are no normal numbers.
  return mantissa * from_bits(uint32_t(half + 127) << 23) * from_bits(uint32_t(exponent - half + 127) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <class T>
inline float rounded_to(float value) {
  if constexpr (sizeof(T) == 2) return from_bits(uint32_t(to_bfloat16(value)) << 16);
  return value;
}

template <class T>
struct Swish {
  static float apply(float x, const Gate&) { return x / (1.0f + exponential(-x)); }
};
template <class T>
struct ScaledSwish {
  static float apply(float x, const Gate& gate) {
    return x * rounded_to<T>(sigmoid(rounded_to<T>(x * gate.alpha)));
  }
};
template <class T>
struct Relu {
  static float apply(float x, const Gate&) { return x < 0.0f ? 0.0f : x; }
};
template <class T>
struct Gelu {
  static float apply(float x, const Gate&) { return x * 0.5f * (1.0f + std::erf(x * 0.70710678f)); }
};
template <class T>
struct GeluTanh {  // 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
  static float apply(float x, const Gate&) { return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }
};

// h[i] for i < inner from channels [2 * inner].
template <class T, template <class> class F>
void gate_row(const T* channels, T* h, int64_t inner, const Gate& gate) {
  const int64_t stride = gate.interleaved ? 2 : 1, to_up = gate.interleaved ? 1 : inner;
  for (int64_t i = 0; i < inner; ++i) {
    float x = load(channels, i * stride), up = load(channels, i * stride + to_up);
    x = x > gate.limit ? gate.limit : x;
    up = up > gate.limit ? gate.limit : up;
    up = up < -gate.limit ? -gate.limit : up;
    up = rounded_to<T>(up + gate.shift);
    store(h, i, rounded_to<T>(F<T>::apply(x, gate)) * up);
  }
}

template <class T>
void apply_gate(const T* channels, T* h, int64_t inner, const Gate& gate) {
  switch (gate.function) {
    case 0: return gate.alpha == 1.0f ? gate_row<T, Swish>(channels, h, inner, gate)
                                      : gate_row<T, ScaledSwish>(channels, h, inner, gate);
    case 1: return gate_row<T, Gelu>(channels, h, inner, gate);
    case 2: return gate_row<T, GeluTanh>(channels, h, inner, gate);
    default: return gate_row<T, Relu>(channels, h, inner, gate);
  }
}

}  // namespace
