// Kernels for AVX2 with FMA and F16C: 16 registers of 8 floats.
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

// 8 weights of a native matrix from `at` on, zero past `left`.
template <int64_t KIND>
static inline __attribute__((always_inline)) __m256 eight(const Matrix &m, int64_t at, int64_t left) {
    constexpr int64_t SIZE = KIND == F32 ? 4 : 2;
    const uint8_t *from = m.codes + at * SIZE;
    alignas(32) uint8_t padded[32];
    if (left < 8) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, from, left * SIZE);
        from = padded;
    }
    if constexpr (KIND == F32) return _mm256_loadu_ps((const float *)from);
    __m128i half = _mm_loadu_si128((const __m128i *)from);
    if constexpr (KIND == F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Add the products of 8 columns of ROWS rows with T tokens.
template <int64_t KIND, int ROWS, int T>
static inline __attribute__((always_inline)) void add_eight(const Matrix &m, int64_t row, int64_t c, int64_t left,
                                                            const Input *x, __m256 (*sum)[T]) {
    __m256 token[T];
    for (int t = 0; t < T; t++) token[t] = _mm256_loadu_ps(x[t].x + c);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        __m256 w = eight<KIND>(m, (row + r) * m.cols + c, left);
        for (int t = 0; t < T; t++) sum[r][t] = _mm256_fmadd_ps(w, token[t], sum[r][t]);
    }
}

static inline float total(__m256 x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// ROWS rows times T tokens. Each output has a sum of its own, so it does not depend on the others.
template <int64_t KIND, int ROWS, int T>
static inline void dot_native(const Matrix &m, int64_t row, const Input *x, float *const *y) {
    constexpr int64_t SIZE = KIND == F32 ? 4 : 2, LINE = 64 / SIZE;
    __m256 sum[ROWS][T];
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < T; t++) sum[r][t] = _mm256_setzero_ps();
    int64_t c = 0;
    for (; c + LINE <= m.cols; c += LINE) {
        for (int r = 0; r < ROWS; r++)
            _mm_prefetch((const char *)m.codes + ((row + r + ROWS) * m.cols + c) * SIZE, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int64_t i = 0; i < LINE; i += 8) add_eight<KIND, ROWS, T>(m, row, c + i, 8, x, sum);
    }
    for (; c < m.cols; c += 8) add_eight<KIND, ROWS, T>(m, row, c, m.cols - c, x, sum);
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < T; t++) y[t][row + r] = total(sum[r][t]);
}

template <int64_t KIND, int ROWS, int T>
static void dot(const Matrix &m, int64_t first, int64_t last, const Input *x, float *const *y) {
    int64_t row = first;
    for (; row + ROWS <= last; row += ROWS) dot_native<KIND, ROWS, T>(m, row, x, y);
    for (; row < last; row++) dot_native<KIND, 1, T>(m, row, x, y);
}

template <int64_t KIND>
static void dot(const Matrix &m, int64_t first, int64_t last, const Input *x, int64_t tokens, float *const *y) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) dot<KIND, 2, 4>(m, first, last, x + t, y + t);
    for (; t + 2 <= tokens; t += 2) dot<KIND, 4, 2>(m, first, last, x + t, y + t);
    if (t < tokens) dot<KIND, 4, 1>(m, first, last, x + t, y + t);
}

static void native_dot(const Matrix &m, int64_t first, int64_t last, const Input *x, int64_t tokens,
                       float *const *y) {
    if (m.kind == F32) dot<F32>(m, first, last, x, tokens, y);
    else if (m.kind == BF16) dot<BF16>(m, first, last, x, tokens, y);
    else dot<F16>(m, first, last, x, tokens, y);
}

typedef float V __attribute__((vector_size(32)));
constexpr int SUMS = 8;

static inline __attribute__((always_inline)) V muladd(V a, V b, V c) {
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

static inline __attribute__((always_inline)) V from_halves(const uint16_t *at) {
    return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
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

typedef uint8_t VB __attribute__((vector_size(32)));
typedef VI RI;
typedef V RV;
constexpr int WIDEST = 2, UNROLL = 16;
constexpr bool SIGNED_BYTES = true;

static inline RV row_halves(const uint16_t *at) { return from_halves(at); }
static inline RV row_muladd(RV a, RV b, RV c) { return muladd(a, b, c); }

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
