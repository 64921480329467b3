// The vectors of mx_cpu_dot.h in AVX2: bytes are multiplied to sums of pairs in 16 bits, which hold them exactly.
//
//     4 bits:  2 * (15 * 127 * 2) = 7620, two products each of low and of high nibbles; E2M1 2 * (24 * 64 * 2)
//     8 bits:  128 * 127 * 2 = 32512, as |w| * (x with the sign of w)

namespace {

using Floats = __m256;
using Mask = __m256i;

inline Floats add_product(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }

// The bytes of a vector of codes that are `left` in a row, a multiple of four.
inline Mask bytes_mask(int64_t left) {
  const __m256i begins = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(std::min<int64_t>(left, 32))), begins);
}

inline __m256i load_lanes(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }

// A vector of codes: of 8 bits, or low and high nibbles as unsigned numbers, which are integers plus 8, or twice the values
// of E2M1 plus 12.
template <class E>
struct Codes {
  __m256i parts[Dot<E>::PARTS];

  Codes(Mask mask, const uint8_t* codes) {
    parts[0] = _mm256_maskload_epi32(reinterpret_cast<const int*>(codes), mask);
    if constexpr (E::BITS == 4) {
      const __m256i nibble = _mm256_set1_epi8(15);
      if constexpr (E::INTEGER) parts[0] = _mm256_xor_si256(parts[0], _mm256_set1_epi8(char(0x88)));
      parts[1] = _mm256_and_si256(_mm256_srli_epi16(parts[0], 4), nibble);
      parts[0] = _mm256_and_si256(parts[0], nibble);
    }
    if constexpr (std::is_same_v<E, E2M1>) {
      const __m256i table = _mm256_broadcastsi128_si256(
          _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
      for (auto& part : parts) part = _mm256_shuffle_epi8(table, part);
    }
  }
};

template <class E>
inline Floats dot(const Codes<E>& codes, const Chunk<E>& chunk) {
  if constexpr (E::BITS == 8) {
    const __m256i x = _mm256_sign_epi8(load_lanes(chunk.x[0][0]), codes.parts[0]);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes.parts[0]), x);
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  } else {
    __m256i sum = load_lanes(chunk.start);
    for (int digit = 0; digit < Dot<E>::DIGITS; ++digit) {
      const auto& x = chunk.x[digit];
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(codes.parts[0], load_lanes(x[0])),
                                             _mm256_maddubs_epi16(codes.parts[1], load_lanes(x[1])));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(int16_t(1 << (digit * DIGIT_BITS)))));
    }
    return _mm256_cvtepi32_ps(sum);
  }
}

// Decode the scale bytes of up to 8 blocks.
inline Floats block_scales(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  if (count >= 8)
    std::memcpy(&word, bytes, 8);
  else
    for (int64_t i = 0; i < count; ++i) word |= uint64_t(bytes[i]) << (8 * i);
  const __m256i each = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(word))), quiet = _mm256_set1_epi32(0x00400000);
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi32(each, _mm256_set1_epi32(255)), quiet);
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_max_epi32(_mm256_slli_epi32(each, 23), quiet), nan));
}

// Scales of the blocks that lanes belong to: lane i to block (first + i) >> shift.
inline Floats lane_scales(Floats scales, int first, int shift) {
  const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
  return _mm256_permutevar8x32_ps(scales, _mm256_srli_epi32(lane, shift));
}

// Horizontal sums of four vectors; the order of additions depends only on a vector's own position.
inline __m128 four_sums(Floats a, Floats b, Floats c, Floats d) {
  const __m256 quarters = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1));
}

}  // namespace
