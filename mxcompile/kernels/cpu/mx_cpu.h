// The arguments of the matmul kernels in mx_cpu.cpp; cpu/linears.py mirrors these structs with ctypes.

#pragma once

#include <cstdint>

// A packed weight [rows, ...], a bias [rows] or null, and the output y [tokens, rows]; bias and y are float32 if `wide`,
// otherwise bfloat16.
struct Weight {
  const uint8_t* elements;
  const uint8_t* scales;
  const void* bias;
  void* y;
  int64_t rows;
  int wide;
};

// How inputs are rounded. element: index in `with_element`. threshold: for the mantissa of a block's maximum, in
// [0.5, 1]. or_equal: whether the threshold itself raises the exponent. largest: exponent of the input dtype's maximum.
struct Rounding {
  int element;
  float threshold;
  int or_equal;
  int largest;
};

// `mx_multiply`: y = x @ weight.T + bias for several weights. x [tokens, size] is rounded first unless `rounding` is
// null; 1 to 4 tokens. wide: x is float32, otherwise bfloat16.
using Multiply = void(const Weight* weights, int count, const void* x, int wide, int64_t tokens, int64_t size,
                      const Rounding* rounding, int max_threads);
constexpr int64_t MAX_TOKENS = 4;
