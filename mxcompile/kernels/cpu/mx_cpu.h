// What mx_cpu.cpp's products take; cpu/linears.py has the same by ctypes.

#pragma once

#include <cstdint>

// A weight [rows, ...], a bias [rows] or null, and where the product goes, [tokens, rows]; both float32 if `wide`,
// otherwise bfloat16.
struct Weight {
  const uint8_t* elements;
  const uint8_t* scales;
  const void* bias;
  void* y;
  int64_t rows;
  int wide;
};

// How inputs are rounded. element: place in `with_element`. threshold: of the mantissa of a block's maximum, in [0.5, 1].
// largest: the exponent of the input dtype's largest value.
struct Rounding {
  int element;
  float threshold;
  int or_equal;
  int largest;
};

// `mx_multiply`: the products of x [tokens, size], rounded first unless `rounding` is null, with some weights; tokens from
// 1 to 4. wide: x is float32, otherwise bfloat16.
using Multiply = void(const Weight* weights, int count, const void* x, int wide, int64_t tokens, int64_t size,
                      const Rounding* rounding, int most_threads);
constexpr int64_t MOST_TOKENS = 4;
