// MX on the CPU: matmuls with packed weights, decoding, and rounding of activations. Built by cpu/build.py, called by
// cpu/linears.py.

#include "mx_cpu.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "mx_cpu_elements.h"
#include "mx_cpu_rounding.h"
#include "mx_cpu_values.h"

namespace {

inline float total(Lanes<WIDEST>::Floats values) {
  float parts[WIDEST];
  std::memcpy(parts, &values, sizeof parts);
  for (int width = WIDEST / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

// Add the bias, round once, store.
inline void finish(const Product& product, int64_t m, int64_t n, float value) {
  if (product.bias != nullptr)
    value += product.wide_bias ? load(static_cast<const float*>(product.bias), n)
                               : load(static_cast<const uint16_t*>(product.bias), n);
  if (product.wide)
    store(static_cast<float*>(product.y[m]), n, value);
  else
    store(static_cast<uint16_t*>(product.y[m]), n, value);
}

// y[m][n] = x[m] . weight[n, :] for M inputs laid out as values and the weight rows [begin, end).
template <class E, int B, int M>
void multiply_rows(const Product& product, int64_t begin, int64_t end) {
  constexpr int64_t BYTES = B * E::BITS / 8;
  const int64_t blocks = product.blocks;
  const float* x[M];
  for (int m = 0; m < M; ++m) x[m] = static_cast<const float*>(product.x[m]);
  for (int64_t n = begin; n < end; ++n) {
    const uint8_t* row = product.elements + n * blocks * BYTES;
    const uint8_t* exponents = product.scales + n * blocks;
    Lanes<WIDEST>::Floats sums[M][2] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      float values[B];
      decode_block<E, B>(row + block * BYTES, SCALES<E>.values[exponents[block]], values);
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < B; i += WIDEST)
          sums[m][i / WIDEST % 2] += load_floats<WIDEST>(x[m] + block * B + i) * load_floats<WIDEST>(values + i);
    }
    for (int m = 0; m < M; ++m) finish(product, m, n, total(sums[m][0] + sums[m][1]));
  }
}

}  // namespace

#include "mx_cpu_dot.h"
#include "mx_cpu_linears.h"
#include "mx_cpu_panels.h"

namespace {

// Lay out one input as values in whole blocks, rounded first if `rounding` is not null.
template <class E, int B, class From>
void lay_out_values(const From* x, int64_t size, const Rounding* rounding, float* values) {
  for (int64_t i = size; i % B != 0; ++i) values[i] = 0.0f;
  with_element(rounding == nullptr ? -1 : rounding->element, [&](auto element) {
    using A = decltype(element);
    if constexpr (std::is_same_v<A, std::nullptr_t>) {
      for (int64_t i = 0; i < size; ++i) values[i] = load(x, i);
    } else {
      round_row<A, B>(x, values, size, *rounding);
    }
  });
}

// Lay out one input as elements. False if the dot products do not take it.
template <class E, int B, class From>
bool lay_out_elements(const From* x, int64_t size, const Rounding& rounding, int is_rounded, void* to) {
  bool done = false;
#ifdef MX_DOT
  with_element(rounding.element, [&](auto element) {
    using A = decltype(element);
    if constexpr (!std::is_same_v<A, std::nullptr_t>)
      if constexpr (Dot<E>::template TAKES<A>)
        done = lay_out<E, B, A>(x, size, rounding, is_rounded, static_cast<Chunk<E>*>(to), chunks_of<E, B>(size));
  });
#endif
  return done;
}

// Lay out one input as pairs. False if it is not bfloat16 or the processor does not multiply pairs.
template <int B, class From>
bool lay_out_as_pairs(const From* x, int64_t size, const Rounding* rounding, void* to) {
#ifdef MX_PAIRS
  if constexpr (std::is_same_v<From, uint16_t>) {
    lay_out_pairs<B>(x, size, rounding, static_cast<uint16_t*>(to));
    return true;
  }
#endif
  return false;
}

template <class E, int B, int M>
void multiply(const Product& product, int layout, int64_t begin, int64_t end) {
#ifdef MX_DOT
  if constexpr (Dot<E>::EXISTS)
    if (layout == ELEMENTS) return dot_range<E, B, M>(product, begin, end);
#endif
  multiply_rows<E, B, M>(product, begin, end);
}

}  // namespace

using Format = MX_ELEMENT;  // defined on the compiler's command line: one library per format
constexpr int BLOCK = MX_BLOCK;

extern "C" {

int64_t mx_prepared_bytes(int64_t size) {
  const int64_t values = (size + BLOCK - 1) / BLOCK * BLOCK * int64_t(sizeof(float));
  int64_t elements = 0;
#ifdef MX_DOT
  if constexpr (Dot<Format>::EXISTS) elements = chunks_of<Format, BLOCK>(size) * int64_t(sizeof(Chunk<Format>));
#endif
  return (std::max(values, elements) + 63) / 64 * 64;  // pairs take half the bytes of values, in whole vectors
}

int mx_prepare(const void* x, int wide, int64_t size, const Rounding* rounding, int is_rounded, int layout, void* to) {
  const auto prepare = [&](auto from) {
    if (layout == ELEMENTS)
      return rounding != nullptr && lay_out_elements<Format, BLOCK>(from, size, *rounding, is_rounded, to);
    if (layout == PAIRS) return lay_out_as_pairs<BLOCK>(from, size, is_rounded ? nullptr : rounding, to);
    lay_out_values<Format, BLOCK>(from, size, is_rounded ? nullptr : rounding, static_cast<float*>(to));
    return true;
  };
  return wide ? prepare(static_cast<const float*>(x)) : prepare(static_cast<const uint16_t*>(x));
}

void mx_multiply_part(const Product* product, int layout, int64_t begin, int64_t end) {
#ifdef MX_PAIRS
  if (layout == PAIRS) return multiply_panels<Format, BLOCK>(*product, begin, end);
#endif
  switch (product->tokens) {
    case 1: return multiply<Format, BLOCK, 1>(*product, layout, begin, end);
    case 2: return multiply<Format, BLOCK, 2>(*product, layout, begin, end);
    case 3: return multiply<Format, BLOCK, 3>(*product, layout, begin, end);
    case 4: return multiply<Format, BLOCK, 4>(*product, layout, begin, end);
  }
}

int mx_takes_pairs() {
#ifdef MX_PAIRS
  return 1;
#else
  return 0;
#endif
}

const Kernels* mx_kernels() {
  static const Kernels kernels{mx_prepared_bytes, mx_prepare, mx_multiply_part, BLOCK, Format::BITS, mx_takes_pairs()};
  return &kernels;
}

// By a team of threads.
void mx_multiply(const Weight* weights, int count, const void* x, int wide, int64_t tokens, int64_t size,
                 const Rounding* rounding, int max_threads) {
  static thread_local std::vector<CacheLine> buffer;
  const Linears call{mx_kernels(), weights, count, x, wide, tokens, size, rounding};
  Team team;
  team.run(worthwhile_threads(call.values(), max_threads), [&] { multiply_all(team, call, buffer); });
}

// values [rows, size], float32 or (wide == 0) bfloat16.
void mx_decode(const uint8_t* elements, const uint8_t* scales, void* values, int wide, int64_t rows, int64_t size,
               int max_threads) {
  const int threads = worthwhile_threads(rows * size, max_threads);
  const int64_t blocks = (size + BLOCK - 1) / BLOCK, bytes = blocks * (BLOCK * Format::BITS / 8);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* packed = elements + row * bytes;
    if (wide)
      decode_row<Format, BLOCK>(packed, scales + row * blocks, static_cast<float*>(values) + row * size, size);
    else
      decode_row<Format, BLOCK>(packed, scales + row * blocks, static_cast<uint16_t*>(values) + row * size, size);
  }
}

// to [rows, size] = from [rows, size] rounded to this format; both float32 if `wide`, otherwise bfloat16.
void mx_round(const void* from, void* to, int wide, int64_t rows, int64_t size, const Rounding* rounding,
              int max_threads) {
  const auto call = wide ? round_rows<Format, BLOCK, float> : round_rows<Format, BLOCK, uint16_t>;
  call(from, to, rows, size, *rounding, worthwhile_threads(rows * size, max_threads));
}
}
