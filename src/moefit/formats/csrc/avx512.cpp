// Processors with AVX-512 and its integer products (VNNI), which sum 64 products of bytes at a time: codes
// stay small integers up to the product, and a group's scale multiplies its sum.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"
#include "kinds.h"
#include "matrix.h"
#include "target.h"

TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")

namespace avx512 {

#include "inputs.inc"

// Bits low to low + 1 of each byte, at place `low`, of the four fields of two bits in 16 bytes.
template <int LOW>
static inline __m512i pairs(const uint8_t *at) {
    constexpr int a = (32 - LOW) % 32, b = (34 - LOW) % 32, c = (36 - LOW) % 32, d = (38 - LOW) % 32;
    const __m512i turns = _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
    __m512i word = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)at));
    return _mm512_and_si512(_mm512_rorv_epi32(word, turns), _mm512_set1_epi8(3 << LOW));
}

static inline __m512i nibbles(const uint8_t *at) {
    __m256i word = _mm256_loadu_si256((const __m256i *)at);
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(word), _mm256_srli_epi16(word, 4), 1);
    return _mm512_and_si512(both, _mm512_set1_epi8(15));
}

static inline __m512i with_bit(__m512i codes, const uint8_t *at, char value) {
    uint64_t mask;
    std::memcpy(&mask, at, 8);
    return _mm512_mask_add_epi8(codes, mask, codes, _mm512_set1_epi8(value));
}

// The 64 codes of a group, a byte each.
template <int64_t BITS>
static inline __m512i group_codes(const uint8_t *at) {
    if constexpr (BITS == INT8) return _mm512_loadu_si512(at);
    if constexpr (BITS == INT6) return _mm512_or_si512(nibbles(at), pairs<4>(at + 32));
    if constexpr (BITS == INT5) return with_bit(nibbles(at), at + 32, 16);
    if constexpr (BITS == INT4) return nibbles(at);
    if constexpr (BITS == INT3) return with_bit(pairs<0>(at), at + 16, 4);
    return pairs<0>(at);
}

// 16 halves as floats, zero from `left` on.
static inline __m512 halves(const uint8_t *at, int64_t left) {
    __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at));
}

// ROWS rows at once: as many streams from memory and independent sums, and each x loaded once for all.
template <int64_t KIND, int ROWS, int T>
static inline void dot_grouped(const Matrix &m, int64_t row, const Input *x, float *const *y) {
    constexpr int64_t META = KIND == INT8 ? 2 : 4;
    int64_t groups = groups_of(m.cols);
    const uint8_t *codes = m.codes + row * groups * KIND * 8, *meta = m.meta + row * groups * META;
    __m512 sum[ROWS][T];
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < T; t++) sum[r][t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g += 16) {
        int64_t left = groups - g, number = left < 16 ? left : 16;
        __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
        alignas(64) float factor[ROWS][T][16];
        for (int r = 0; r < ROWS; r++) {
            const uint8_t *at = meta + r * groups * META + 2 * g;
            __m512 scale = halves(at, left);
            __m512 least = KIND == INT8 ? _mm512_mul_ps(scale, _mm512_set1_ps(-128)) : halves(at + 2 * groups, left);
            for (int t = 0; t < T; t++) {
                __m512 each = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, x[t].scale + g));
                _mm512_store_ps(factor[r][t], each);
                sum[r][t] = _mm512_fmadd_ps(least, _mm512_maskz_loadu_ps(mask, x[t].sum + g), sum[r][t]);
            }
        }
        for (int64_t i = 0; i < number; i++) {
            int64_t at = (g + i) * GROUP;
            __m512i code[ROWS];
            for (int r = 0; r < ROWS; r++) {
                const uint8_t *here = codes + (r * groups + g + i) * KIND * 8;
                code[r] = group_codes<KIND>(here);
                // Rows are too short for the processor to see that the next ones will be wanted.
                _mm_prefetch((const char *)here + ROWS * groups * KIND * 8, _MM_HINT_T0);
            }
            for (int t = 0; t < T; t++) {
                __m512i high = _mm512_loadu_si512(x[t].high + at), low = _mm512_loadu_si512(x[t].low + at);
                for (int r = 0; r < ROWS; r++) {
                    __m512i both = _mm512_dpbusd_epi32(_mm512_setzero_si512(), code[r], high);
                    both = _mm512_dpbusd_epi32(_mm512_slli_epi32(both, 7), code[r], low);
                    __m512 each = _mm512_set1_ps(factor[r][t][i]);
                    sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), each, sum[r][t]);
                }
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < T; t++) y[t][row + r] = _mm512_reduce_add_ps(sum[r][t]);
}

// 16 weights of a native matrix from `at` on, zero behind `left`.
template <int64_t KIND>
static inline __m512 sixteen(const Matrix &m, int64_t at, int64_t left) {
    __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
    if constexpr (KIND == F32) return _mm512_maskz_loadu_ps(mask, (const float *)m.codes + at);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)m.codes + at);
    if constexpr (KIND == F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// ROWS rows at once, for as many independent sums; each x is then loaded once for all of them.
template <int64_t KIND, int ROWS, int T>
static inline void dot_native(const Matrix &m, int64_t row, const Input *x, float *const *y) {
    __m512 sum[ROWS][T];
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < T; t++) sum[r][t] = _mm512_setzero_ps();
    for (int64_t c = 0; c < m.cols; c += 16)
        for (int r = 0; r < ROWS; r++) {
            __m512 w = sixteen<KIND>(m, (row + r) * m.cols + c, m.cols - c);
            constexpr int64_t SIZE = KIND == F32 ? 4 : 2;
            _mm_prefetch((const char *)m.codes + ((row + r + ROWS) * m.cols + c) * SIZE, _MM_HINT_T0);
            for (int t = 0; t < T; t++)
                sum[r][t] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x[t].x + c), sum[r][t]);
        }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < T; t++) y[t][row + r] = _mm512_reduce_add_ps(sum[r][t]);
}

template <int64_t KIND, int T>
static void dot(const Matrix &m, int64_t first, int64_t last, const Input *x, float *const *y) {
    int64_t row = first;
    if constexpr (KIND == F32 || KIND == BF16 || KIND == F16) {
        for (; row + 4 <= last; row += 4) dot_native<KIND, 4, T>(m, row, x, y);
        for (; row < last; row++) dot_native<KIND, 1, T>(m, row, x, y);
    } else {
        for (; row + 4 <= last; row += 4) dot_grouped<KIND, 4, T>(m, row, x, y);
        for (; row < last; row++) dot_grouped<KIND, 1, T>(m, row, x, y);
    }
}

static void any_dot(const Matrix &m, int64_t first, int64_t last, const Input *x, int64_t tokens,
                    float *const *y) {
#define DOT(kind)                                                                                  \
    (tokens == 1   ? dot<kind, 1>(m, first, last, x, y)                                            \
     : tokens == 2 ? dot<kind, 2>(m, first, last, x, y)                                            \
     : tokens == 3 ? dot<kind, 3>(m, first, last, x, y)                                            \
                   : dot<kind, 4>(m, first, last, x, y))
    FOR_KIND(m.kind, DOT)
}

template <int64_t KIND>
static void decode(const Matrix &m, int64_t row, float *out) {
    int64_t groups = groups_of(m.cols);
    for (int64_t g = 0; g < groups; g++)
        if constexpr (KIND == F32 || KIND == BF16 || KIND == F16) {
            for (int64_t c = g * GROUP; c < (g + 1) * GROUP; c += 16)
                _mm512_storeu_ps(out + c, sixteen<KIND>(m, row * m.cols + c, m.cols - c));
        } else {
            const uint8_t *meta = m.meta + row * groups * (KIND == INT8 ? 2 : 4) + 2 * g;
            uint16_t half[2] = {};
            std::memcpy(half, meta, 2);
            if (KIND != INT8) std::memcpy(half + 1, meta + 2 * groups, 2);
            float step = _cvtsh_ss(half[0]);
            __m512 scale = _mm512_set1_ps(step);
            __m512 least = _mm512_set1_ps(KIND == INT8 ? -128 * step : _cvtsh_ss(half[1]));
            alignas(64) uint8_t code[GROUP];
            _mm512_store_si512(code, group_codes<KIND>(m.codes + (row * groups + g) * KIND * 8));
            for (int i = 0; i < GROUP; i += 16) {
                __m128i code16 = _mm_load_si128((const __m128i *)(code + i));
                __m512 w = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(code16));
                _mm512_storeu_ps(out + g * GROUP + i, _mm512_fmadd_ps(w, scale, least));
            }
        }
}

static void narrow(const float *from, int64_t number, uint16_t *out) {
    const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff), quiet = _mm512_set1_epi32(0x40);
    for (int64_t i = 0; i < number; i += 16) {
        __mmask16 mask = number - i >= 16 ? 0xffff : (1u << (number - i)) - 1;
        __m512 value = _mm512_maskz_loadu_ps(mask, from + i);
        __m512i word = _mm512_castps_si512(value), high = _mm512_srli_epi32(word, 16);
        __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(word, half), _mm512_and_si512(high, one));
        __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        nearest = _mm512_mask_or_epi32(_mm512_srli_epi32(nearest, 16), nan, high, quiet);
        _mm256_mask_storeu_epi16(out + i, mask, _mm512_cvtepi32_epi16(nearest));
    }
}

static void any_decode(const Matrix &m, int64_t row, float *out) {
#define DECODE(kind) decode<kind>(m, row, out)
    FOR_KIND(m.kind, DECODE)
}

typedef float V __attribute__((vector_size(64)));

static inline V muladd(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

static inline V halves16(const uint16_t *at) {
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}

#include "attention.inc"

}  // namespace avx512

TARGET_END

const Level AVX512 = {avx512::any_dot, avx512::any_decode, avx512::narrow, avx512::widen, avx512::integers,
                      avx512::any_attend};
#endif
