// The arguments of the matmul kernels in mx_cpu.cpp; cpu/linears.py mirrors these structs with ctypes.

#pragma once

#include <algorithm>
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

// A packed weight times prepared inputs x, each to a row y of its own: up to MAX_TOKENS, or any number of PAIRS. blocks: of
// a weight row. y and the bias (or null) are float32 if `wide` or `wide_bias`, otherwise bfloat16.
struct Product {
  const uint8_t* elements;
  const uint8_t* scales;
  const void* bias;
  int64_t blocks;
  int64_t tokens;
  int wide_bias;
  int wide;
  const void* const* x;
  void* const* y;
};

// How inputs are prepared: as float32 values, as elements for the dot products of mx_cpu_dot.h, or as bfloat16 for
// mx_cpu_panels.h.
enum Layout { VALUES = 0, ELEMENTS = 1, PAIRS = 2 };

struct alignas(64) CacheLine {
  char bytes[64];
};

// The kernels of one weight format. `prepare` lays out one input of `size` values in `prepared_bytes(size)` bytes
// aligned to 64; it rounds the values first, unless `rounding` is null or `is_rounded`. It returns 0 if the layout does
// not take the input: ELEMENTS takes rounded values alone, PAIRS bfloat16 alone, and only if `takes_pairs`; VALUES takes
// all. `multiply` computes rows [begin, end).
struct Kernels {
  int64_t (*prepared_bytes)(int64_t size);
  int (*prepare)(const void* x, int wide, int64_t size, const Rounding* rounding, int is_rounded, int layout, void* to);
  void (*multiply)(const Product* product, int layout, int64_t begin, int64_t end);
  int64_t block;
  int64_t bits;
  int takes_pairs;
};

// Threads for a matmul with so many values of weights.
inline int worthwhile_threads(int64_t values, int max_threads) {
  constexpr int64_t VALUES_PER_THREAD = 1 << 17;
  return int(std::clamp<int64_t>(values / VALUES_PER_THREAD, 1, max_threads));
}
