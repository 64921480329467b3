// MX on the CPU: matmuls with packed weights, decoding, and rounding of activations. Built by cpu/build.py, called by
// cpu/linears.py.
//
// The packed layout is that of packing.py. Loops over the elements of a block have fixed length, so that the compiler
// vectorizes them for the machine it builds for.

#include "mx_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
  if constexpr (std::is_same_v<E, E2M1> && N == 16) {  // all 16 values fit in one register
    const Floats values = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};
    return __builtin_shuffle(values, codes);
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
  constexpr int N = E::BITS == 8 ? 16 : E::BITS == 4 ? (B == 16 ? 8 : 16) : (B == 16 ? 4 : B == 32 ? 8 : 16);
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

inline float total(Lanes<16>::Floats values) {
  float parts[16];
  std::memcpy(parts, &values, sizeof parts);
  for (int width = 8; width > 0; width /= 2)
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
    Lanes<16>::Floats sums[M][2] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      float values[B];
      decode_block<E, B>(row + block * BYTES, SCALES<E>.values[exponents[block]], values);
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < B; i += 16)
          sums[m][i / 16 % 2] += load_floats<16>(x[m] + block * B + i) * load_floats<16>(values + i);
    }
    for (int m = 0; m < M; ++m) finish(product, m, n, total(sums[m][0] + sums[m][1]));
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
#ifdef MX_DOT
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
#ifdef MX_DOT
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
#ifdef MX_DOT
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
