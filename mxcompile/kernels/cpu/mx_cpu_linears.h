// Several weights times one input by a team of threads: the matmuls of `mx_multiply` and of recorded graphs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "mx_cpu.h"
#include "mx_cpu_threads.h"

namespace {

constexpr int64_t VALUES_PER_TASK = 1 << 16, ROWS_AT_ONCE = 4;

// Weights times x, as in `Multiply`.
struct Linears {
  const Kernels* kernels;
  const Weight* weights;
  int64_t count;
  const void* x;
  int64_t wide;
  int64_t tokens;
  int64_t size;
  const Rounding* rounding;

  int64_t values() const {
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i) rows += weights[i].rows;
    return rows * size;
  }
};

// Lay out the inputs of `call` in `buffer`; returns their layout.
inline int prepare_inputs(const Linears& call, std::vector<CacheLine>& buffer) {
  const int64_t lines = call.kernels->prepared_bytes(call.size) / 64, row_bytes = call.size * (call.wide ? 4 : 2);
  if (int64_t(buffer.size()) < call.tokens * lines) buffer.resize(call.tokens * lines);
  int layout = ELEMENTS;
  for (int64_t m = 0; m < call.tokens; ++m) {
    const void* row = static_cast<const char*>(call.x) + m * row_bytes;
    if (call.kernels->prepare(row, int(call.wide), call.size, call.rounding, 0, layout, buffer.data() + m * lines)) continue;
    layout = VALUES;
    m = -1;  // all of them again
  }
  return layout;
}

// Rows [begin, end) of one weight.
inline void multiply_rows_of(const Linears& call, const Weight& weight, const CacheLine* prepared, int layout, int64_t begin,
                             int64_t end) {
  const int64_t lines = call.kernels->prepared_bytes(call.size) / 64, block = call.kernels->block;
  const void* inputs[MAX_TOKENS];
  void* outputs[MAX_TOKENS];
  for (int64_t m = 0; m < call.tokens; ++m) {
    inputs[m] = prepared + m * lines;
    outputs[m] = static_cast<char*>(weight.y) + m * weight.rows * (weight.wide ? 4 : 2);
  }
  const Product product{weight.elements, weight.scales, weight.bias, (call.size + block - 1) / block,
                        call.tokens,     weight.wide,   weight.wide, inputs, outputs};
  call.kernels->multiply(&product, layout, begin, end);
}

// All rows of all weights, in tasks of about VALUES_PER_TASK values.
inline void multiply_all(Team& team, const Linears& call, std::vector<CacheLine>& buffer) {
  const int layout = prepare_inputs(call, buffer);
  const CacheLine* prepared = buffer.data();
  const int64_t rows = call.values() / std::max<int64_t>(call.size, 1);
  const int64_t step = (VALUES_PER_TASK / std::max<int64_t>(call.size, 1) + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * ROWS_AT_ONCE;
  team.share((rows + step - 1) / step, [&, step](int64_t task) {
    int64_t begin = task * step;
    const int64_t end = begin + step;
    for (int64_t i = 0, first = 0; i < call.count && first < end; first += call.weights[i++].rows) {
      const Weight& weight = call.weights[i];
      const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, weight.rows);
      if (from < to) multiply_rows_of(call, weight, prepared, layout, from, to);
    }
  });
}

}  // namespace
