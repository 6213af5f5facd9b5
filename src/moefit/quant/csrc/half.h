// float16 in integer arithmetic: the same values on every processor.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

constexpr float LARGEST = 65504;  // of float16

// The bits of the nearest float16, ties to even; larger values become the largest.
static inline uint16_t to_half(float x) {
    x = std::min(std::max(x, -LARGEST), LARGEST);
    uint32_t word;
    std::memcpy(&word, &x, 4);
    uint32_t sign = (word >> 16) & 0x8000, size = word & 0x7fffffff;
    if (size < 0x38800000) {  // below float16's normal numbers: multiples of 2^-24
        float steps = std::nearbyint(std::fabs(x) * 0x1p24f);
        return uint16_t(sign | uint32_t(steps));
    }
    uint32_t nearest = size + 0xfff + ((size >> 13) & 1);
    return uint16_t(sign | ((nearest >> 13) - (112 << 10)));
}

// Rounded as the hardware's conversion does, including infinities and NaN.
static inline uint16_t half_of(float x) {
    if (std::fabs(x) < 65520) return to_half(x);
    uint32_t word;
    std::memcpy(&word, &x, 4);
    uint32_t sign = (word >> 16) & 0x8000;
    return uint16_t(sign | (x == x ? 0x7c00 : 0x7e00 | ((word >> 13) & 0x3ff)));
}

static inline float from_half(uint16_t bits) {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * float(mantissa);
    uint32_t word = sign | ((exponent == 31 ? 255u : exponent + 112) << 23) | (mantissa << 13);
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

static inline float as_half(float x) { return from_half(to_half(x)); }

// Round subnormal values up, so that codes still cover all weights.
static inline float scale_as_half(float scale) {
    return scale < 0x1p-14f ? std::ceil(scale / 0x1p-24f) * 0x1p-24f : as_half(scale);
}
