// Kernels for AVX2 with FMA and F16C: 16 registers of 8 floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "../attention.h"
#include "../half.h"
#include "../kinds.h"
#include "../matrix.h"
#include "../target.h"

TARGET_BEGIN("avx2,fma,f16c")

namespace avx2 {
#include "plain.inc"
#include "inputs.inc"

typedef float V __attribute__((vector_size(32)));
constexpr int SUMS = 8;

static inline __attribute__((always_inline)) V muladd(V a, V b, V c) {
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

static inline __attribute__((always_inline)) V from_halves(const uint16_t *at) {
    return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
}

static inline __attribute__((always_inline)) void to_halves(V x, uint16_t *to) {
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}

static inline __attribute__((always_inline)) V from_bytes(const int8_t *at) {
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
}

static inline __attribute__((always_inline)) V reduced(V *a) {
    for (int i = 0; i < 4; i++) {
        V x = a[2 * i], y = a[2 * i + 1];
        a[i] = __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13) +
               __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 2; i++) {
        V x = a[2 * i], y = a[2 * i + 1];
        a[i] = __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    return __builtin_shufflevector(a[0], a[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a[0], a[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

#include "attention.inc"
#include "rows.inc"
#include "latent.inc"

// 8 weights of a row from a column on, zero past `left`.
template <int64_t KIND>
static inline __attribute__((always_inline)) V weights(const Matrix &m, int64_t row, int64_t column, int64_t left) {
    constexpr int64_t SIZE = bytes_of(KIND);
    const uint8_t *from = m.codes + (row * m.cols + column) * SIZE;
    alignas(32) uint8_t padded[32];
    if (left < 8) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, from, left * SIZE);
        from = padded;
    }
    if constexpr (KIND == F32) return at_any<V>(from);
    if constexpr (KIND == FP8) {
        __m128i code = _mm_unpacklo_epi8(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)from));
        __m128i half = _mm_and_si128(_mm_srai_epi16(code, 1), _mm_set1_epi16(int16_t(0xbfff)));
        return (V)_mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(fp8_scale(m, row, column)));
    }
    __m128i half = _mm_loadu_si128((const __m128i *)from);
    if constexpr (KIND == F16) return (V)_mm256_cvtph_ps(half);
    return (V)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

static inline float total(V x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

constexpr int TILE_ROWS = 3, FEW_ROWS = 2, ONE_ROWS = 4;

#include "floats.inc"

typedef uint8_t VB __attribute__((vector_size(32)));

static inline __attribute__((always_inline)) VB table_values(VB codes) {
    const __m256i table = _mm256_broadcastsi128_si256(at_any<__m128i>(E2M1_VALUES));
    return (VB)_mm256_shuffle_epi8(table, (__m256i)codes);
}

#include "codes.inc"
#include "avx2_integers.inc"
#include "../scaled/avx2.inc"

static void any_dot(const Matrix &m, int64_t first, int64_t last, const Panel &panel, float *const *y) {
    if (is_scaled(m.kind) || is_k_quant(m.kind)) return scaled_dot(m, first, last, panel, y);
    switch (m.kind) {
        case INT2: return integer_dot<INT2>(m, first, last, panel, y);
        case INT3: return integer_dot<INT3>(m, first, last, panel, y);
        case INT4: return integer_dot<INT4>(m, first, last, panel, y);
        case INT5: return integer_dot<INT5>(m, first, last, panel, y);
        case INT6: return integer_dot<INT6>(m, first, last, panel, y);
        case INT8: return integer_dot<INT8>(m, first, last, panel, y);
    }
    any_float_dot(m, first, last, panel, y);
}

static int64_t token_bytes(const Matrix &m, const Input *) {
    return has_digits(m) ? groups_of(m.cols) * digit_bytes(m) : float_token_bytes(m);
}

static void pack(const Matrix &m, const Input *x, int64_t tokens, uint8_t *packed) {
    if (has_digits(m)) pack_integers(m, x, tokens, packed);
    else if (tokens == BLOCK) pack_floats(m, x, packed);
}
}

TARGET_END

const Level AVX2 = {avx2::any_dot, avx2::token_bytes, avx2::pack, avx2::any_decode, avx2::any_narrow, avx2::any_narrow,
    avx2::any_widen, avx2::any_round, avx2::integers, avx2::any_attend, avx2::any_quantize, avx2::any_norm, avx2::any_rotate, avx2::any_silu,
    avx2::any_add_rows, avx2::any_dot_rows};
#endif
