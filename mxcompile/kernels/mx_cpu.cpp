// MX on the CPU: products with packed weights, decoding, and rounding of activations. See cpu.py, which builds it.
//
// Bytes lie as packing.py says. Loops over the elements of a block have fixed length, so that a compiler turns them
// into vector instructions of whatever machine it builds for.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// A weight [rows, ...], a bias [rows] or null, and where the product goes: [tokens, rows].
struct Weight {
  const uint8_t* elements;
  const uint8_t* scales;
  const float* bias;
  float* y;
  int64_t rows;
};

namespace {

constexpr int EXPONENT_BIAS = 127;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even

// Bit layouts of elements; the numbers are those of formats.py.
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

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// 2^exponent for exponents from -149 on.
inline float power_of_two(int exponent) {
  return exponent > -EXPONENT_BIAS ? from_bits(uint32_t(exponent + EXPONENT_BIAS) << 23)
                                   : from_bits(1u << (exponent + 149));
}

// `N` values side by side, as vector instructions take them. (GCC wants the sizes of vectors as plain numbers.)
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

// Codes to values; integers in steps, which the scale makes good.
template <class E, int N>
inline typename Lanes<N>::Floats decode(typename Lanes<N>::Ints codes) {
  using Ints = typename Lanes<N>::Ints;
  using Floats = typename Lanes<N>::Floats;
  constexpr int32_t SIGN = 1 << (E::BITS - 1);
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
  if constexpr (std::is_same_v<E, E2M1> && N == 16) {  // a table of all values is one register
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

// The elements of one block, `B` of them, times its scale.
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

// y [M, n] = x [M, blocks * B] times row n of a weight, for its rows from `begin` to `end`.
template <class E, int B, int M>
void multiply_rows(const Weight& weight, const float* x, int64_t stride, int64_t blocks, int64_t begin, int64_t end) {
  constexpr int64_t BYTES = B * E::BITS / 8;
  for (int64_t n = begin; n < end; ++n) {
    const uint8_t* row = weight.elements + n * blocks * BYTES;
    const uint8_t* exponents = weight.scales + n * blocks;
    Lanes<16>::Floats sums[M][2] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      float values[B];
      decode_block<E, B>(row + block * BYTES, SCALES<E>.values[exponents[block]], values);
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < B; i += 16)
          sums[m][i / 16 % 2] += load_floats<16>(x + m * stride + block * B + i) * load_floats<16>(values + i);
    }
    for (int m = 0; m < M; ++m) {
      const Lanes<16>::Floats both = sums[m][0] + sums[m][1];
      weight.y[m * weight.rows + n] = total(both) + (weight.bias == nullptr ? 0.0f : weight.bias[n]);
    }
  }
}

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float load(const float* from, int64_t at) { return from[at]; }
inline float load(const uint16_t* from, int64_t at) { return from_bits(uint32_t(from[at]) << 16); }
inline void store(float* to, int64_t at, float value) { to[at] = value; }
inline void store(uint16_t* to, int64_t at, float value) { to[at] = to_bfloat16(value); }

// One row of a weight to values, `size` of them.
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

// Values of a block to the nearest elements times the block's scale; reference.py says how.
template <class E, int B>
inline void round_block(float* values, float threshold, int or_equal, int largest) {
  uint32_t amax = 0;
  for (int i = 0; i < B; ++i) {
    const uint32_t magnitude = to_bits(values[i]) & 0x7fffffffu;
    amax = magnitude > amax ? magnitude : amax;
  }
  if (amax >= 0x7f800000u) {
    for (int i = 0; i < B; ++i) values[i] = NAN;
    return;
  }
  int exponent;
  const float mantissa = std::frexp(from_bits(amax), &exponent);
  exponent += -1 - E::EMAX + (or_equal ? mantissa >= threshold : mantissa > threshold);
  exponent = exponent < -EXPONENT_BIAS ? -EXPONENT_BIAS : exponent;
  exponent = exponent > largest - E::EMAX ? largest - E::EMAX : exponent;
  const float down = power_of_two(-exponent), up = power_of_two(exponent);
  if constexpr (E::INTEGER) {
    constexpr float STEPS = exact_power(E::MANTISSA_BITS), MOST = float(E::MAX_CODE);
    for (int i = 0; i < B; ++i) {
      float steps = ((values[i] * down) * STEPS + MAGIC) - MAGIC;
      steps = steps > MOST ? MOST : steps;
      steps = steps < -MOST ? -MOST : steps;
      values[i] = (steps + 0.0f) * (1.0f / STEPS) * up;
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
      values[i] = std::copysign(rounded, v) * up;
    }
  }
}

// One row, rounded in its own type; `to` may be wider.
template <class E, int B, class From, class To>
void round_row(const From* from, To* to, int64_t size, float threshold, int or_equal, int largest) {
  for (int64_t start = 0; start < size; start += B) {
    float values[B] = {};
    const int64_t count = size - start < B ? size - start : B;
    if (count == B) {
      for (int i = 0; i < B; ++i) values[i] = load(from, start + i);
    } else {
      for (int64_t i = 0; i < count; ++i) values[i] = load(from, start + i);
    }
    round_block<E, B>(values, threshold, or_equal, largest);
    if constexpr (sizeof(From) < sizeof(To))
      for (int i = 0; i < B; ++i) values[i] = from_bits(uint32_t(to_bfloat16(values[i])) << 16);
    if (count == B) {
      for (int i = 0; i < B; ++i) store(to, start + i, values[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) store(to, start + i, values[i]);
    }
  }
}

template <class E, int B, class From, class To>
void round_rows(const void* from, void* to, int64_t rows, int64_t size, int64_t stride, float threshold, int or_equal,
                int largest, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    round_row<E, B>(static_cast<const From*>(from) + row * size, static_cast<To*>(to) + row * stride, size, threshold,
                    or_equal, largest);
}

}  // namespace

using Format = MX_ELEMENT;  // given on the compiler's command line: one library for each format
constexpr int BLOCK = MX_BLOCK;

extern "C" {

// The products of x [m, blocks * BLOCK], rows `stride` apart, with some weights; m from 1 to 4.
void mx_multiply(const Weight* weights, int count, const float* x, int64_t stride, int64_t m, int64_t blocks,
                 int threads) {
  const auto rows = m == 1   ? multiply_rows<Format, BLOCK, 1>
                    : m == 2 ? multiply_rows<Format, BLOCK, 2>
                    : m == 3 ? multiply_rows<Format, BLOCK, 3>
                             : multiply_rows<Format, BLOCK, 4>;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part)
    for (int i = 0; i < count; ++i)
      rows(weights[i], x, stride, blocks, weights[i].rows * part / threads, weights[i].rows * (part + 1) / threads);
}

// values [rows, size], float32 or (wide == 0) bfloat16.
void mx_decode(const uint8_t* elements, const uint8_t* scales, void* values, int wide, int64_t rows, int64_t size,
               int threads) {
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

// to [rows, size], rows `stride` apart, = from [rows, size] rounded. from_wide, to_wide: float32, otherwise bfloat16.
// threshold: of the mantissa of a block's maximum, in [0.5, 1].
void mx_round(const void* from, int from_wide, void* to, int to_wide, int64_t rows, int64_t size, int64_t stride,
              float threshold, int or_equal, int largest, int threads) {
  const auto call = from_wide ? round_rows<Format, BLOCK, float, float>
                    : to_wide ? round_rows<Format, BLOCK, uint16_t, float>
                              : round_rows<Format, BLOCK, uint16_t, uint16_t>;
  call(from, to, rows, size, stride, threshold, or_equal, largest, threads);
}
}
