// The vectors of mx_cpu_dot.h in AVX-512: `vpdpbusd` for integers, `vdpbf16ps` for E2M1.

namespace {

using Floats = __m512;
using Mask = __mmask64;

inline Floats add_product(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }

// The bytes of a vector of codes that are `left` in a row.
inline Mask bytes_mask(int64_t left) { return left >= 64 ? ~0ull : (1ull << left) - 1; }

// A vector of codes: integers plus their offset in unsigned bytes, or E2M1 in bfloat16.
template <class E>
struct Codes {
  __m512i parts[Dot<E>::PARTS];

  Codes(Mask mask, const uint8_t* codes) {
    if constexpr (Dot<E>::INTEGER) {
      constexpr int XOR_AND = 0x28;  // (a ^ b) & c
      const __m512i nibble = _mm512_set1_epi8(0x0f), sign = _mm512_set1_epi8(E::BITS == 4 ? char(0x88) : char(0x80));
      const __m512i loaded = _mm512_maskz_loadu_epi8(mask, codes);
      if constexpr (E::BITS == 4) {
        parts[0] = _mm512_ternarylogic_epi32(loaded, sign, nibble, XOR_AND);
        parts[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(loaded, 4), sign, nibble, XOR_AND);
      } else {
        parts[0] = _mm512_xor_si512(loaded, sign);
      }
    } else {
      const __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(__mmask32(mask), codes));
      const __m512i table = _mm512_castsi256_si512(_mm256_setr_epi16(  // E2M1's values in bfloat16
          0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, int16_t(0x8000), int16_t(0xbf00),
          int16_t(0xbf80), int16_t(0xbfc0), int16_t(0xc000), int16_t(0xc040), int16_t(0xc080), int16_t(0xc0c0)));
      parts[0] = _mm512_permutexvar_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(0x000f)), table);
      parts[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, 4), table);
    }
  }
};

template <class E>
inline Floats dot(const Codes<E>& codes, const Chunk<E>& chunk) {
  if constexpr (Dot<E>::INTEGER) {
    __m512i sum = _mm512_load_si512(chunk.start);
    for (int part = 0; part < Dot<E>::PARTS; ++part)
      sum = _mm512_dpbusd_epi32(sum, codes.parts[part], _mm512_load_si512(chunk.x[0][part]));
    return _mm512_cvtepi32_ps(sum);
  } else {
    __m512 sum = _mm512_setzero_ps();
    for (int part = 0; part < Dot<E>::PARTS; ++part)
      sum = _mm512_dpbf16_ps(sum, __m512bh(codes.parts[part]), __m512bh(_mm512_load_si512(chunk.x[0][part])));
    return sum;
  }
}

// Decode the scale bytes of up to 16 blocks.
inline Floats block_scales(const uint8_t* bytes, int64_t count) {
  const __mmask16 mask = count >= 16 ? 0xffff : (1 << count) - 1;
  const __m512i each = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes));
  __m512i bits = _mm512_slli_epi32(each, 23);
  bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(each, each), _mm512_set1_epi32(0x00400000));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(each, _mm512_set1_epi32(255));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
}

// Scales of the blocks that lanes belong to: lane i to block (first + i) >> shift.
inline Floats lane_scales(Floats scales, int first, int shift) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(first)), shift), scales);
}

// Horizontal sums of four vectors; the order of additions depends only on a vector's own position.
inline __m128 four_sums(Floats a, Floats b, Floats c, Floats d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

}  // namespace
