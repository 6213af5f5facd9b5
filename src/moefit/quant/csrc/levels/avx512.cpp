// Kernels for AVX-512 with VNNI, which sums 64 products of bytes at a time: codes are multiplied as small
// integers, and a group's scale multiplies the sum.
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

// Byte i of the 8 has the bits of codes i, i + 8, i + 16, ...
static inline __m512i with_bit(__m512i codes, const uint8_t *at, char value) {
    int64_t word;
    std::memcpy(&word, at, 8);
    const __m512i bits = _mm512_sllv_epi64(_mm512_set1_epi8(1), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    __mmask64 mask = _mm512_test_epi8_mask(_mm512_set1_epi64(word), bits);
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

// 16 weights of a row from a column on, zero past `left`.
template <int64_t KIND>
static inline __m512 sixteen(const Matrix &m, int64_t row, int64_t column, int64_t left) {
    const int64_t at = row * m.cols + column;
    __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
    if constexpr (KIND == F32) return _mm512_maskz_loadu_ps(mask, (const float *)m.codes + at);
    if constexpr (KIND == FP8) {
        __m256i code = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(mask, m.codes + at)), 8);
        __m256i half = _mm256_and_si256(_mm256_srai_epi16(code, 1), _mm256_set1_epi16(int16_t(0xbfff)));
        return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(fp8_scale(m, row, column)));
    }
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)m.codes + at);
    if constexpr (KIND == F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// A group of a row of grouped integers that is not in a slab.
template <int64_t KIND>
static inline void grouped_weights(const uint8_t *codes, const uint8_t *meta, int64_t groups, int64_t g, float *out) {
    uint16_t half[2] = {};
    std::memcpy(half, meta + 2 * g, 2);
    if (KIND != INT8) std::memcpy(half + 1, meta + 2 * (groups + g), 2);
    float step = _cvtsh_ss(half[0]);
    __m512 scale = _mm512_set1_ps(step);
    __m512 least = _mm512_set1_ps(KIND == INT8 ? -128 * step : _cvtsh_ss(half[1]));
    alignas(64) uint8_t code[GROUP];
    _mm512_store_si512(code, group_codes<KIND>(codes + g * KIND * 8));
    for (int i = 0; i < GROUP; i += 16) {
        __m128i code16 = _mm_load_si128((const __m128i *)(code + i));
        __m512 w = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(code16));
        _mm512_storeu_ps(out + i, _mm512_fmadd_ps(w, scale, least));
    }
}

template <int64_t KIND>
static void decode(const Matrix &m, int64_t row, float *out) {
    int64_t groups = groups_of(m.cols);
    if constexpr (KIND == F32 || KIND == BF16 || KIND == F16 || KIND == FP8) {
        for (int64_t c = 0; c < groups * GROUP; c += 16)
            _mm512_storeu_ps(out + c, sixteen<KIND>(m, row, c, m.cols - c));
    } else {
        std::vector<uint8_t> bytes(code_bytes(m) + meta_bytes(m));
        uint8_t *meta = bytes.data() + code_bytes(m);
        copy_row(m, row, bytes.data(), meta);
        for (int64_t g = 0; g < groups; g++) grouped_weights<KIND>(bytes.data(), meta, groups, g, out + g * GROUP);
    }
}

static void any_decode(const Matrix &m, int64_t row, float *out) {
    if (is_k_quant(m.kind)) return decode_k(m, row, out);
    if (is_scaled(m.kind)) return decode_scaled(m, row, out);
#define DECODE(kind) decode<kind>(m, row, out)
    FOR_KIND(m.kind, DECODE)
}

typedef float V __attribute__((vector_size(64)));
constexpr int SUMS = 16;

static inline V muladd(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

static inline V from_halves(const uint16_t *at) {
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}

static inline __attribute__((always_inline)) void to_halves(V x, uint16_t *to) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}

static inline __attribute__((always_inline)) V from_bytes(const int8_t *at) {
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
}

// Reduce 16 vectors to one with the sum of each, all added in the same order.
static inline __attribute__((always_inline)) V reduced(V *a) {
    for (int i = 0; i < 8; i++) {
        V x = a[2 * i], y = a[2 * i + 1];
        a[i] = __builtin_shufflevector(x, y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               __builtin_shufflevector(x, y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
    for (int i = 0; i < 4; i++) {
        V x = a[2 * i], y = a[2 * i + 1];
        a[i] = __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    for (int i = 0; i < 2; i++) {
        V x = a[2 * i], y = a[2 * i + 1];
        a[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               __builtin_shufflevector(x, y, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
    return __builtin_shufflevector(a[0], a[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a[0], a[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

#include "attention.inc"
#include "rows.inc"
#include "latent.inc"

// 16 floats as bfloat16 or float16.
template <int64_t KIND>
static inline __attribute__((always_inline)) __m256i narrowed(const float *from) {
    __m512 value = _mm512_loadu_ps(from);
    if constexpr (KIND == F16) return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)to_bfloat16s((V)value), 16));
}

template <int64_t KIND>
static void narrow_past(const float *from, int64_t number, void *to) {
    for (int64_t i = 0; i < number; i += 32) {
        __m512i two = _mm512_castsi256_si512(narrowed<KIND>(from + i));
        _mm512_stream_si512((__m512i *)to + i / 32, _mm512_inserti64x4(two, narrowed<KIND>(from + i + 16), 1));
    }
}

// Past the caches: the rows of a product with many tokens are often powers of two apart, which evict each other.
static void any_narrow_past(const float *from, int64_t kind, int64_t number, void *to) {
    if (kind == F32 || number % 32 || (uintptr_t)to % 64) any_narrow(from, kind, number, to);
    else if (kind == BF16) narrow_past<BF16>(from, number, to);
    else narrow_past<F16>(from, number, to);
}

template <int64_t KIND>
static inline __attribute__((always_inline)) V weights(const Matrix &m, int64_t row, int64_t column, int64_t left) {
    return (V)sixteen<KIND>(m, row, column, left);
}

static inline float total(V x) { return _mm512_reduce_add_ps((__m512)x); }

constexpr int TILE_ROWS = 6, FEW_ROWS = 4, ONE_ROWS = 1;

#include "floats.inc"

typedef uint8_t VB __attribute__((vector_size(64)));
typedef VI RI;
typedef V RV;

static inline RV row_halves(const uint16_t *at) { return from_halves(at); }
static inline RV row_muladd(RV a, RV b, RV c) { return muladd(a, b, c); }

constexpr int WIDEST = 8, UNROLL = 16;

template <int64_t KIND>
static inline __attribute__((always_inline)) RI product(RI sum, VB codes, int32_t four) {
    return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(four));
}

static inline __attribute__((always_inline)) VB table_values(VB codes) {
    const __m512i table = _mm512_broadcast_i32x4(at_any<__m128i>(E2M1_VALUES));
    return (VB)_mm512_shuffle_epi8(table, (__m512i)codes);
}

#include "slabs.inc"

static void any_dot(const Matrix &m, int64_t first, int64_t last, const Panel &panel, float *const *y) {
    if (any_slab_dot(m, first, last, panel, y)) return;
    any_float_dot(m, first, last, panel, y);
}

static int64_t any_token_bytes(const Matrix &m, const Input *x) {
    return has_digits(m) ? token_bytes(m, x) : float_token_bytes(m);
}

static void any_pack(const Matrix &m, const Input *x, int64_t tokens, uint8_t *packed) {
    if (has_digits(m)) pack(m, x, tokens, packed);
    else if (tokens == BLOCK) pack_floats(m, x, packed);
}

}  // namespace avx512

TARGET_END

const Level AVX512 = {avx512::any_dot, avx512::any_token_bytes, avx512::any_pack, avx512::any_decode, avx512::any_narrow, avx512::any_narrow_past,
    avx512::any_widen, avx512::any_round, avx512::integers, avx512::any_attend, avx512::any_quantize, avx512::any_norm, avx512::any_rotate, avx512::any_silu,
    avx512::any_add_rows, avx512::any_dot_rows};
#endif
