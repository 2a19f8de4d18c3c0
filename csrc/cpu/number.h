// The three element types, as the bits they are stored in, and their conversions one at a time.
#pragma once

#include <cstdint>
#include <cstring>

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

enum DType : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kNumDTypes = 3 };

inline int64_t item_size(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float value) { return value; }

inline float widen(BFloat value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float widen(Half value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  // Moved into place, the exponent is 112 too small; the product is exact and puts subnormals right too.
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;  // infinity or NaN
  return float_of(finite | special | static_cast<uint32_t>(value.bits & 0x8000) << 16);
}

inline void narrow(float value, float* out) { *out = value; }

inline void narrow(float value, BFloat* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  out->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

inline void narrow(float value, Half* out) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // rounds to 65536 or more: infinity
  } else if (magnitude < 0x38800000) {
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // subnormal: the addition rounds
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}
