// Matmuls with many inputs: eight rows of a weight at a time are decoded to bfloat16, and stay in the first cache while
// they are multiplied by all inputs, as pairs of bfloat16. Included by mx_cpu.cpp, on processors with those products.

#ifdef MX_PAIRS

namespace {

constexpr int PANEL = 8, STRIPE = 3, PAIRED = 32;  // rows, inputs at a time, values of a vector

// Values of a row of a panel, or of an input, with padding.
template <int B>
inline int64_t padded(int64_t blocks) {
  return (blocks * B + PAIRED - 1) / PAIRED * PAIRED;
}

// Decode one row of a weight to bfloat16 values. The 16 values of four bits are multiplied by a block's scale, and looked
// up; products that bfloat16 does not have are subnormal, and the pairs' products take those for zero.
template <class E, int B>
void decode_panel_row(const uint8_t* packed, const uint8_t* scales, uint16_t* values, int64_t blocks) {
  if constexpr (E::BITS != 4 || B < 32) {
    decode_row<E, B>(packed, scales, values, blocks * B);
  } else {
    const Lanes<16>::Ints codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512 elements = __m512(decode<E, 16>(codes));
    const __m256i nibble = _mm256_set1_epi16(15);
    for (int64_t block = 0; block < blocks; ++block, packed += B / 2, values += B) {
      const __m512 scaled = _mm512_mul_ps(elements, _mm512_set1_ps(SCALES<E>.values[scales[block]]));
      const __m256i table = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(scaled), 16));
      for (int i = 0; i < B / 2; i += 16) {
        const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i)));
        const __m256i low = _mm256_permutexvar_epi16(_mm256_and_si256(bytes, nibble), table);
        const __m256i high = _mm256_permutexvar_epi16(_mm256_srli_epi16(bytes, 4), table);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + i), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + B / 2 + i), high);
      }
    }
  }
}

// `finish` for a whole panel, in vectors.
inline void finish_panel(const Product& product, int64_t m, int64_t n, float* y) {
  if (product.bias != nullptr && product.wide_bias)
    for (int r = 0; r < PANEL; ++r) y[r] += load(static_cast<const float*>(product.bias) + n, r);
  else if (product.bias != nullptr)
    for (int r = 0; r < PANEL; ++r) y[r] += load(static_cast<const uint16_t*>(product.bias) + n, r);
  if (product.wide)
    for (int r = 0; r < PANEL; ++r) store(static_cast<float*>(product.y[m]) + n, r, y[r]);
  else
    for (int r = 0; r < PANEL; ++r) store(static_cast<uint16_t*>(product.y[m]) + n, r, y[r]);
}

// Rows [n, n + count) of a product with the M inputs from `first` on; the panel has them as values.
template <int M>
void multiply_panel(const Product& product, const uint16_t* panel, int64_t stride, int64_t first, int64_t n, int64_t count) {
  const uint16_t* x[M];
  for (int m = 0; m < M; ++m) x[m] = static_cast<const uint16_t*>(product.x[first + m]);
  __m512 sums[M][PANEL];
  for (auto& input : sums)
    for (auto& sum : input) sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < stride; k += PAIRED) {
    __m512bh values[M];
    for (int m = 0; m < M; ++m) values[m] = __m512bh(_mm512_loadu_si512(x[m] + k));
    for (int r = 0; r < PANEL; ++r) {
      const __m512bh row = __m512bh(_mm512_loadu_si512(panel + r * stride + k));
      for (int m = 0; m < M; ++m) sums[m][r] = _mm512_dpbf16_ps(sums[m][r], row, values[m]);
    }
  }
  for (int m = 0; m < M; ++m) {
    float y[PANEL];
    for (int r = 0; r < PANEL; r += 4)
      _mm_storeu_ps(y + r, four_sums(sums[m][r], sums[m][r + 1], sums[m][r + 2], sums[m][r + 3]));
    if (count == PANEL)
      finish_panel(product, first + m, n, y);
    else
      for (int64_t r = 0; r < count; ++r) finish(product, first + m, n + r, y[r]);
  }
}

template <class E, int B>
void multiply_panels(const Product& product, int64_t begin, int64_t end) {
  static thread_local std::vector<uint16_t> buffer;
  const int64_t stride = padded<B>(product.blocks);
  buffer.assign(PANEL * stride, 0);
  for (int64_t n = begin; n < end; n += PANEL) {
    const int64_t count = std::min<int64_t>(PANEL, end - n);
    for (int64_t r = 0; r < count; ++r)
      decode_panel_row<E, B>(product.elements + (n + r) * product.blocks * (B * E::BITS / 8),
                             product.scales + (n + r) * product.blocks, buffer.data() + r * stride, product.blocks);
    int64_t m = 0;
    for (; m + STRIPE <= product.tokens; m += STRIPE)
      multiply_panel<STRIPE>(product, buffer.data(), stride, m, n, count);
    if (product.tokens - m == 2) multiply_panel<2>(product, buffer.data(), stride, m, n, count);
    if (product.tokens - m == 1) multiply_panel<1>(product, buffer.data(), stride, m, n, count);
  }
}

// Lay out one input of bfloat16 as pairs, rounded first if `rounding` is not null.
template <int B>
void lay_out_pairs(const uint16_t* x, int64_t size, const Rounding* rounding, uint16_t* values) {
  for (int64_t i = size; i < padded<B>((size + B - 1) / B); ++i) values[i] = 0;
  with_element(rounding == nullptr ? -1 : rounding->element, [&](auto element) {
    using A = decltype(element);
    if constexpr (std::is_same_v<A, std::nullptr_t>)
      std::memcpy(values, x, size_t(size) * sizeof(uint16_t));
    else
      round_row<A, B>(x, values, size, *rounding);
  });
}

}  // namespace
#endif
