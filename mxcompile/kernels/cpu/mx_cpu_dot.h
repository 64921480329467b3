// Matmuls that accumulate each block with integer or bfloat16-pair dot products and then scale the partial sums: for
// quantized inputs, on processors with AVX2 or the dot products of AVX-512. Included by mx_cpu.cpp, whose own matmul
// multiplies decoded values.
//
// x is stored as elements in the order in which the weight's bytes are decoded, a vector of bytes at a time. Integer
// partial sums are exact; bfloat16 pairs are exact products accumulated in float32.

#include "mx_cpu_rounding.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__) && defined(__AVX512DQ__) && defined(__GNUC__)
#define MX_DOT 16
#define MX_PAIRS 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__GNUC__)
#define MX_DOT 8
#endif

#ifdef MX_DOT
#include <immintrin.h>

namespace {

constexpr int WIDTH = MX_DOT;  // 32-bit lanes of a vector
constexpr int DIGIT_BITS = 7;

// How the elements of a weight are multiplied: GROUP elements of x per 32-bit lane, PARTS operands per vector of codes.
// E2M1 is multiplied as bfloat16 where the processor does that. Elsewhere its doubled values are integers, and those of x,
// in units of the smallest E4M3, DIGITS signed digits of DIGIT_BITS.
template <class E>
struct Dot {
  static constexpr bool FP4 = std::is_same_v<E, E2M1>, BFLOAT = FP4 && WIDTH == 16;
  static constexpr bool INTEGER = (E::INTEGER && E::BITS != 6) || (FP4 && !BFLOAT), EXISTS = INTEGER || BFLOAT;
  static constexpr int PARTS = 8 / E::BITS, GROUP = INTEGER ? 4 : 2, CHUNK = WIDTH * GROUP, DIGITS = FP4 && !BFLOAT ? 3 : 1;
  static constexpr int OFFSET = FP4 ? 12 : WIDTH == 8 && E::BITS == 8 ? 0 : 1 << (E::BITS - 1);
  static constexpr float UNIT = BFLOAT ? 1.0f : FP4 ? 0.5f : exact_power(-E::MANTISSA_BITS);
  // Whether inputs rounded to A can use these dot products.
  template <class A>
  static constexpr bool TAKES = EXISTS && (A::INTEGER || BFLOAT || (FP4 && !std::is_same_v<A, E5M2>));
  // The unit of elements of A as integers.
  template <class A>
  static constexpr float STEP = exact_power(-(FP4 ? -E4M3::EMIN + E4M3::MANTISSA_BITS : A::MANTISSA_BITS));
};

// The part of x that a vector of integer codes, or half a vector of E2M1 as bfloat16, is multiplied by. start: minus the
// contribution of the codes' offset, where accumulation starts.
template <class E>
struct alignas(64) Chunk {
  uint8_t x[Dot<E>::DIGITS][Dot<E>::PARTS][4 * WIDTH];
  int32_t start[WIDTH];
  float scale[WIDTH];
};

}  // namespace

#if MX_DOT == 16
#include "mx_cpu_dot512.h"
#else
#include "mx_cpu_dot256.h"
#endif

namespace {

// The number of chunks of an input of `size` values.
template <class E, int B>
inline int64_t chunks_of(int64_t size) {
  const int64_t row = (size + B - 1) / B * (B / Dot<E>::PARTS);
  return (row + Dot<E>::CHUNK - 1) / Dot<E>::CHUNK;
}

// y[M][4] = M inputs times R <= 4 rows of a weight, starting at row n. Scales are decoded for WIDTH blocks at once,
// which span as many chunks as a block has lanes.
template <class E, int B, int R, int M>
inline void dot_rows(const Product& product, int64_t n, float* y) {
  constexpr int BYTES = B * E::BITS / 8, STEP = Dot<E>::CHUNK, LANES = B / (Dot<E>::GROUP * Dot<E>::PARTS);
  constexpr int SHIFT = __builtin_ctz(LANES);
  constexpr int AHEAD = 4096;  // bytes; hardware prefetching stops at the end of a page
  const int64_t blocks = product.blocks, chunks = chunks_of<E, B>(blocks * B);
  const uint8_t* codes = product.elements + n * blocks * BYTES;
  const uint8_t* scales = product.scales + n * blocks;
  const Chunk<E>* x[M];
  for (int m = 0; m < M; ++m) x[m] = static_cast<const Chunk<E>*>(product.x[m]);
  Floats sums[4][M] = {}, decoded[R];
  for (int64_t block = 0, chunk = 0; block < blocks; block += WIDTH) {
    for (int r = 0; r < R; ++r) decoded[r] = block_scales(scales + r * blocks + block, blocks - block);
    for (int part = 0; part < LANES && chunk < chunks; ++part, ++chunk) {
      const Mask mask = bytes_mask(blocks * BYTES - chunk * STEP);
      for (int r = 0; r < R; ++r) {
        _mm_prefetch(codes + r * blocks * BYTES + chunk * STEP + AHEAD, _MM_HINT_T0);
        const Floats scale = lane_scales(decoded[r], WIDTH * part, SHIFT);
        const Codes<E> decoded_codes(mask, codes + r * blocks * BYTES + chunk * STEP);
        for (int m = 0; m < M; ++m) {
          const Chunk<E>& with = x[m][chunk];
          const Floats sum = dot<E>(decoded_codes, with);
          sums[r][m] = add_product(sum * *reinterpret_cast<const Floats*>(with.scale), scale, sums[r][m]);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) _mm_storeu_ps(y + 4 * m, four_sums(sums[0][m], sums[1][m], sums[2][m], sums[3][m]));
}

template <class E, int B, int M>
void dot_range(const Product& product, int64_t begin, int64_t end) {
  constexpr int R = M == 1 ? 4 : M == 2 ? 2 : 1;
  float y[M][4];
  const auto rows = [&](auto count, int64_t n) {
    dot_rows<E, B, count, M>(product, n, y[0]);
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < count; ++r) finish(product, m, n + r, y[m][r]);
  };
  int64_t n = begin;
  for (; n + R <= end; n += R) rows(std::integral_constant<int, R>{}, n);
  for (; n < end; ++n) rows(std::integral_constant<int, 1>{}, n);
}

// Whether the first `count` values of a block are its elements times its scale.
template <int B, class From>
inline bool equal_values(const From* from, int64_t count, const float* elements, float scale) {
  float values[B];
  load_block<B>(from, count, values);
  int different = 0;
  for (int i = 0; i < B; ++i) different |= !(values[i] == elements[i] * scale);
  return !different;
}

// The elements of a block as the dot products take them: digits of integers, or bfloat16. Returns their unit, times that
// of the weight's.
template <class E, class A, class Element, int B>
inline float to_digits(const float* values, Element (&digits)[Dot<E>::DIGITS][B]) {
  if constexpr (!Dot<E>::INTEGER) {
    for (int i = 0; i < B; ++i) digits[0][i] = Element(to_bits(values[i]) >> 16);  // exact: at most 7 mantissa bits
    return 1.0f;
  } else {
    constexpr int HALF = 1 << (DIGIT_BITS - 1);
    int32_t steps[B];
    for (int i = 0; i < B; ++i) steps[i] = int32_t(values[i] * (1.0f / Dot<E>::template STEP<A>));
    for (int digit = 0; digit + 1 < Dot<E>::DIGITS; ++digit)
      for (int i = 0; i < B; ++i) {
        digits[digit][i] = Element(((steps[i] + HALF) & (2 * HALF - 1)) - HALF);
        steps[i] = (steps[i] - digits[digit][i]) >> DIGIT_BITS;
      }
    for (int i = 0; i < B; ++i) digits[Dot<E>::DIGITS - 1][i] = Element(steps[i]);
    return Dot<E>::template STEP<A> * Dot<E>::UNIT;
  }
}

// Minus what the codes' offset contributes to a lane of a block.
template <class E, int B, class Element>
inline int32_t start_of(const Element (&digits)[Dot<E>::DIGITS][B], int lane) {
  int32_t sum = 0;
  for (int digit = 0; digit < Dot<E>::DIGITS; ++digit)
    for (int part = 0; part < Dot<E>::PARTS; ++part)
      for (int i = 0; i < Dot<E>::GROUP; ++i)
        sum += int32_t(digits[digit][part * (B / Dot<E>::PARTS) + lane * Dot<E>::GROUP + i]) * (1 << (digit * DIGIT_BITS));
  return -Dot<E>::OFFSET * sum;
}

// Round one input to elements of A and lay it out in `count` chunks. False if a scale is so close to the limits of float32
// that a scaled partial sum could exceed them, or if rounding changes an input that `is_rounded`.
template <class E, int B, class A, class From>
bool lay_out(const From* from, int64_t size, const Rounding& rounding, int is_rounded, Chunk<E>* chunks, int64_t count) {
  using Element = std::conditional_t<Dot<E>::INTEGER, int8_t, uint16_t>;
  constexpr int RUN = B / Dot<E>::PARTS, LANES = RUN / Dot<E>::GROUP, PIECE = RUN < Dot<E>::CHUNK ? RUN : Dot<E>::CHUNK;
  std::memset(static_cast<void*>(chunks), 0, size_t(count) * sizeof(Chunk<E>));
  for (int64_t start = 0, block = 0; start < size; start += B, ++block) {
    float values[B];
    load_block<B>(from + start, size - start, values);
    const float scale = to_elements<A, B>(values, rounding);
    if (scale < 0x1p-100f || scale > 0x1p100f) return false;
    if (is_rounded && !equal_values<B>(from + start, size - start, values, scale)) return false;
    Element digits[Dot<E>::DIGITS][B];
    const float unit = to_digits<E, A>(values, digits);
    for (int digit = 0; digit < Dot<E>::DIGITS; ++digit)
      for (int part = 0; part < Dot<E>::PARTS; ++part)
        for (int at = 0; at < RUN; at += PIECE) {
          const int64_t position = block * RUN + at;
          std::memcpy(chunks[position / Dot<E>::CHUNK].x[digit][part] + position % Dot<E>::CHUNK * sizeof(Element),
                      digits[digit] + part * RUN + at, PIECE * sizeof(Element));
        }
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const int64_t position = block * LANES + lane;
      Chunk<E>& chunk = chunks[position / WIDTH];
      chunk.scale[position % WIDTH] = scale * unit;
      chunk.start[position % WIDTH] = Dot<E>::INTEGER ? start_of<E, B>(digits, int(lane)) : 0;
    }
  }
  return true;
}

}  // namespace
#endif
