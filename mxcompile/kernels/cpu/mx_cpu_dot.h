// Matmuls that accumulate each block with integer or bfloat16-pair dot products and then scale the partial sums: for
// quantized inputs, on processors with the dot products of AVX-512. Included by mx_cpu.cpp, whose own matmul multiplies
// decoded values.
//
// x is stored as elements in the order in which the weight's bytes are decoded, 64 bytes at a time. Integer partial sums
// are exact; bfloat16 pairs are exact products accumulated in float32.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__) && defined(__AVX512DQ__) && defined(__GNUC__)
#define MX_DOT 1
#include <immintrin.h>

namespace {

// How the elements of a weight are multiplied: GROUP elements of x per 32-bit lane, PARTS operands per vector of codes.
template <class E>
struct Dot {
  static constexpr bool INTEGER = E::INTEGER && E::BITS != 6, BFLOAT = std::is_same_v<E, E2M1>;
  static constexpr bool EXISTS = INTEGER || BFLOAT;
  static constexpr int PARTS = 8 / E::BITS, GROUP = INTEGER ? 4 : 2, CHUNK = 16 * GROUP, OFFSET = 1 << (E::BITS - 1);
  static constexpr float UNIT = INTEGER ? exact_power(-E::MANTISSA_BITS) : 1.0f;
  // Whether inputs rounded to A can use these dot products.
  template <class A>
  static constexpr bool TAKES = EXISTS && (BFLOAT || A::INTEGER);
};

// The part of x that 64 bytes of integer codes, or 32 bytes of E2M1, are multiplied by. start: minus the contribution of
// the codes' offset, where accumulation starts.
template <class E>
struct alignas(64) Chunk {
  uint8_t x[Dot<E>::PARTS][64];
  int32_t start[16];
  float scale[16];
};

template <class E>
inline __m512 dot(__mmask64 mask, const uint8_t* codes, const Chunk<E>& chunk) {
  const __m512i first = _mm512_load_si512(chunk.x[0]), last = _mm512_load_si512(chunk.x[Dot<E>::PARTS - 1]);
  const __m512i nibble = _mm512_set1_epi16(E::BITS == 4 && Dot<E>::INTEGER ? 0x0f0f : 0x000f);
  if constexpr (Dot<E>::INTEGER) {
    constexpr int XOR_AND = 0x28;  // (a ^ b) & c
    const __m512i sign = _mm512_set1_epi8(E::BITS == 4 ? char(0x88) : char(0x80));
    const __m512i loaded = _mm512_maskz_loadu_epi8(mask, codes);
    __m512i sum = _mm512_load_si512(chunk.start);
    if constexpr (E::BITS == 4) {
      const __m512i high = _mm512_srli_epi16(loaded, 4);
      sum = _mm512_dpbusd_epi32(sum, _mm512_ternarylogic_epi32(loaded, sign, nibble, XOR_AND), first);
      sum = _mm512_dpbusd_epi32(sum, _mm512_ternarylogic_epi32(high, sign, nibble, XOR_AND), last);
    } else {
      sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(loaded, sign), first);
    }
    return _mm512_cvtepi32_ps(sum);
  } else {
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(__mmask32(mask), codes));
    const __m512i table = _mm512_castsi256_si512(_mm256_setr_epi16(  // E2M1's values in bfloat16
        0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, int16_t(0x8000), int16_t(0xbf00),
        int16_t(0xbf80), int16_t(0xbfc0), int16_t(0xc000), int16_t(0xc040), int16_t(0xc080), int16_t(0xc0c0)));
    const __m512i low = _mm512_permutexvar_epi16(_mm512_and_si512(wide, nibble), table);
    const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, 4), table);
    const __m512 sum = _mm512_dpbf16_ps(_mm512_setzero_ps(), __m512bh(low), __m512bh(first));
    return _mm512_dpbf16_ps(sum, __m512bh(high), __m512bh(last));
  }
}

// Decode the scale bytes of up to 16 blocks.
inline __m512 block_scales(const uint8_t* bytes, __mmask16 mask) {
  const __m512i each = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes));
  __m512i bits = _mm512_slli_epi32(each, 23);
  bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(each, each), _mm512_set1_epi32(0x00400000));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(each, _mm512_set1_epi32(255));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
}

// Horizontal sums of four vectors; the order of additions depends only on a vector's own position.
inline __m128 four_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// The number of chunks of an input of `size` values.
template <class E, int B>
inline int64_t chunks_of(int64_t size) {
  const int64_t row = (size + B - 1) / B * (B / Dot<E>::PARTS);
  return (row + Dot<E>::CHUNK - 1) / Dot<E>::CHUNK;
}

// y[M][4] = M inputs times R <= 4 rows of a weight, starting at row n. Scales are decoded for 16 blocks at once, which
// span as many chunks as a block has lanes.
template <class E, int B, int R, int M>
inline void dot_rows(const Product& product, int64_t n, float* y) {
  constexpr int BYTES = B * E::BITS / 8, STEP = Dot<E>::CHUNK, LANES = B / (Dot<E>::GROUP * Dot<E>::PARTS);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  constexpr int AHEAD = 4096;  // bytes; hardware prefetching stops at the end of a page
  const int64_t blocks = product.blocks, chunks = chunks_of<E, B>(blocks * B);
  const uint8_t* codes = product.elements + n * blocks * BYTES;
  const uint8_t* scales = product.scales + n * blocks;
  const Chunk<E>* x[M];
  for (int m = 0; m < M; ++m) x[m] = static_cast<const Chunk<E>*>(product.x[m]);
  __m512 sums[4][M], decoded[R];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t block = 0, chunk = 0; block < blocks; block += 16) {
    const __mmask16 block_mask = blocks - block >= 16 ? 0xffff : (1 << (blocks - block)) - 1;
    for (int r = 0; r < R; ++r) decoded[r] = block_scales(scales + r * blocks + block, block_mask);
    for (int part = 0; part < LANES && chunk < chunks; ++part, ++chunk) {
      const int64_t left = blocks * BYTES - chunk * STEP;
      const __mmask64 mask = left >= STEP ? ~0ull : (1ull << left) - 1;
      const __m512i scale_index = _mm512_srli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16 * part)), __builtin_ctz(LANES));
      for (int r = 0; r < R; ++r) {
        _mm_prefetch(codes + r * blocks * BYTES + chunk * STEP + AHEAD, _MM_HINT_T0);
        const __m512 scale = _mm512_permutexvar_ps(scale_index, decoded[r]);
        for (int m = 0; m < M; ++m) {
          const Chunk<E>& with = x[m][chunk];
          const __m512 sum = dot<E>(mask, codes + r * blocks * BYTES + chunk * STEP, with);
          sums[r][m] = _mm512_fmadd_ps(_mm512_mul_ps(sum, _mm512_load_ps(with.scale)), scale, sums[r][m]);
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
    Element elements[B];
    for (int i = 0; i < B; ++i) {
      if constexpr (Dot<E>::INTEGER)
        elements[i] = Element(int32_t(values[i] * exact_power(A::MANTISSA_BITS)));
      else
        elements[i] = Element(to_bits(values[i]) >> 16);  // exact: no element has more than 7 mantissa bits
    }
    for (int part = 0; part < Dot<E>::PARTS; ++part)
      for (int at = 0; at < RUN; at += PIECE) {
        const int64_t position = block * RUN + at;
        std::memcpy(chunks[position / Dot<E>::CHUNK].x[part] + position % Dot<E>::CHUNK * sizeof(Element),
                    elements + part * RUN + at, PIECE * sizeof(Element));
      }
    const float unit = Dot<E>::INTEGER ? scale * exact_power(-A::MANTISSA_BITS) * Dot<E>::UNIT : scale;
    for (int64_t lane = block * LANES; lane < (block + 1) * LANES; ++lane) chunks[lane / 16].scale[lane % 16] = unit;
  }
  if constexpr (Dot<E>::INTEGER)
    for (int64_t chunk = 0; chunk < count; ++chunk) {
      __m512i sum = _mm512_setzero_si512();
      for (const auto& part : chunks[chunk].x)
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(char(Dot<E>::OFFSET)), _mm512_load_si512(part));
      _mm512_store_si512(chunks[chunk].start, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    }
  return true;
}

}  // namespace
#endif
