// The same loops as portable.cpp, for processors with AVX2 and FMA.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../attention.h"
#include "../kinds.h"
#include "../matrix.h"
#include "../target.h"

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

static inline __attribute__((always_inline)) V bytes16(const int8_t *at) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)at);
    Halves x = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
    V value;
    std::memcpy(&value, &x, 64);
    return value;
}

#include "attention.inc"

typedef uint8_t VB __attribute__((vector_size(32)));
typedef int32_t RI __attribute__((vector_size(32)));
typedef float RV __attribute__((vector_size(32)));
constexpr int WIDEST = 2, UNROLL = 16;
constexpr bool SIGNED_BYTES = true;

static inline RV row_halves(const uint16_t *at) { return (RV)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)); }
static inline RV row_muladd(RV a, RV b, RV c) { return (RV)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

// With codes of at most 6 bits a sum of two products fits in 16 bits; with 8 bits, if they are signed.
template <int64_t KIND>
static inline __attribute__((always_inline)) RI product(RI sum, VB codes, int32_t four) {
    __m256i pairs, x = _mm256_set1_epi32(four), code = (__m256i)codes;
    if constexpr (KIND == INT8) {
        __m256i value = _mm256_xor_si256(code, _mm256_set1_epi8(-128));
        pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(x, value));
    } else {
        pairs = _mm256_maddubs_epi16(code, x);
    }
    return (RI)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "slabs.inc"

static void any_dot(const Matrix &m, int64_t first, int64_t last, const Panel &panel, float *const *y) {
    if (any_slab_dot(m, first, last, panel, y)) return;
    for (int64_t t = 0; t < panel.tokens; t += TOKENS)
        native_dot(m, first, last, panel.x + t, std::min(TOKENS, panel.tokens - t), y + t);
}
}

TARGET_END

const Level AVX2 = {avx2::any_dot, avx2::token_bytes, avx2::pack, avx2::any_decode, avx2::narrow, avx2::narrow,
    avx2::widen, avx2::integers, avx2::any_attend, avx2::any_quantize};
#endif
