// The same loops as portable.cpp, for processors with AVX2 and FMA.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"
#include "kinds.h"
#include "matrix.h"
#include "target.h"

#if defined(__x86_64__)
TARGET_BEGIN("avx2,fma,f16c")

namespace avx2 {
#include "plain.inc"
#include "inputs.inc"
typedef float V __attribute__((vector_size(64)));

struct Halves {
    __m256 low, high;
};

static inline __attribute__((always_inline)) V muladd(V a, V b, V c) {
    Halves x, y, z;
    std::memcpy(&x, &a, 64), std::memcpy(&y, &b, 64), std::memcpy(&z, &c, 64);
    x = {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
    std::memcpy(&a, &x, 64);
    return a;
}

static inline __attribute__((always_inline)) V halves16(const uint16_t *at) {
    const __m128i *half = (const __m128i *)at;
    Halves x = {_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))};
    V value;
    std::memcpy(&value, &x, 64);
    return value;
}

#include "attention.inc"
}

TARGET_END

const Level AVX2 = {avx2::any_dot, avx2::any_decode, avx2::narrow, avx2::widen, avx2::integers,
                    avx2::any_attend};
#endif
