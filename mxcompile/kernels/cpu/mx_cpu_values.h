// Float32 and bfloat16 values: their bits, loads and stores.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even

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

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float load(const float* from, int64_t at) { return from[at]; }
inline float load(const uint16_t* from, int64_t at) { return from_bits(uint32_t(from[at]) << 16); }
inline void store(float* to, int64_t at, float value) { to[at] = value; }
inline void store(uint16_t* to, int64_t at, float value) { to[at] = to_bfloat16(value); }

}  // namespace
