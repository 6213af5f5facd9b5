// Kernels for any processor, with the same results on each.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../attention.h"
#include "../half.h"
#include "../kinds.h"
#include "../matrix.h"
#include "rounding.h"

namespace plain {
#include "plain.inc"
#include "inputs.inc"

// For a matrix of floats.
template <int64_t KIND>
static void dot(const Matrix &m, int64_t first, int64_t last, const Input *x, int64_t tokens,
                float *const *y) {
    for (int64_t row = first; row < last; row++) {
        float sum[TOKENS][16] = {};
        for (int64_t g = 0; g < groups_of(m.cols); g++) {
            float w[GROUP];
            native_weights<KIND>(m, row, g, w);
            for (int64_t t = 0; t < tokens; t++)
                for (int i = 0; i < GROUP; i += 16)
                    for (int lane = 0; lane < 16; lane++)
                        sum[t][lane] += w[i + lane] * x[t].x[g * GROUP + i + lane];
        }
        for (int64_t t = 0; t < tokens; t++) {
            float all = 0;
            for (int lane = 0; lane < 16; lane++) all += sum[t][lane];
            y[t][row] = all;
        }
    }
}

static void native_dot(const Matrix &m, int64_t first, int64_t last, const Input *x, int64_t tokens,
                       float *const *y) {
    if (m.kind == F32) dot<F32>(m, first, last, x, tokens, y);
    else if (m.kind == BF16) dot<BF16>(m, first, last, x, tokens, y);
    else if (m.kind == FP8) dot<FP8>(m, first, last, x, tokens, y);
    else dot<F16>(m, first, last, x, tokens, y);
}

// Vectors of 4 floats, which the vectors of every processor hold.
typedef float V __attribute__((vector_size(16)));
constexpr int SUMS = 8;

static inline V muladd(V a, V b, V c) { return a * b + c; }

static inline V from_halves(const uint16_t *at) {
    return V{from_half(at[0]), from_half(at[1]), from_half(at[2]), from_half(at[3])};
}

static inline void to_halves(V x, uint16_t *to) {
    for (int i = 0; i < 4; i++) to[i] = half_of(x[i]);
}

// Each byte four times in a word, whose top byte is then shifted down with its sign.
static inline V from_bytes(const int8_t *at) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    typedef int16_t Pairs __attribute__((vector_size(16)));
    typedef int32_t Words __attribute__((vector_size(16)));
    int32_t four;
    std::memcpy(&four, at, sizeof four);
    Bytes bytes = (Bytes)Words{four, 0, 0, 0};
    bytes = __builtin_shufflevector(bytes, bytes, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    Pairs pairs = __builtin_shufflevector((Pairs)bytes, (Pairs)bytes, 0, 0, 1, 1, 2, 2, 3, 3);
    return __builtin_convertvector((Words)pairs >> 24, V);
}

static inline V reduced(V *a) {
    for (int i = 0; i < 2; i++) {
        V x = a[2 * i], y = a[2 * i + 1];
        a[i] = __builtin_shufflevector(x, y, 0, 4, 1, 5) + __builtin_shufflevector(x, y, 2, 6, 3, 7);
    }
    return __builtin_shufflevector(a[0], a[1], 0, 1, 4, 5) + __builtin_shufflevector(a[0], a[1], 2, 3, 6, 7);
}

#include "attention.inc"
#include "rows.inc"
#include "latent.inc"

typedef uint8_t VB __attribute__((vector_size(64)));
typedef int32_t RI __attribute__((vector_size(64)));
typedef float RV __attribute__((vector_size(64)));

static inline RV row_halves(const uint16_t *at) {
    RV value;
    for (int i = 0; i < 16; i++) value[i] = from_half(at[i]);
    return value;
}

static inline RV row_muladd(RV a, RV b, RV c) { return a * b + c; }

constexpr int WIDEST = 1, UNROLL = 1;

template <int64_t KIND>
static inline __attribute__((always_inline)) RI product(RI sum, VB codes, int32_t four) {
    typedef uint32_t Words __attribute__((vector_size(64)));
    for (int i = 0; i < 4; i++) {
        RI code = (RI)(((Words)codes >> 8 * i) & 255);
        sum += code * int32_t(int8_t(four >> 8 * i));
    }
    return sum;
}

// The magnitude's codes 5, 6 and 7 have values that are 1, 2 and 5 more.
static inline VB table_values(VB codes) {
    typedef int8_t Signed __attribute__((vector_size(64)));
    Signed size = (Signed)(codes & 7), sign = (Signed)(codes > 7);
    size -= (Signed)(size > 4) + (Signed)(size > 5) + 3 * (Signed)(size > 6);
    return (VB)(((size ^ sign) - sign) + int8_t(E2M1_ZERO));
}

#include "slabs.inc"

static void any_dot(const Matrix &m, int64_t first, int64_t last, const Panel &panel, float *const *y) {
    if (any_slab_dot(m, first, last, panel, y)) return;
    for (int64_t t = 0; t < panel.tokens; t += TOKENS)
        native_dot(m, first, last, panel.x + t, std::min(TOKENS, panel.tokens - t), y + t);
}
}

const Level PORTABLE = {plain::any_dot, plain::token_bytes, plain::pack, plain::any_decode, plain::any_narrow, plain::any_narrow,
    plain::any_widen, plain::any_round, plain::integers, plain::any_attend, plain::any_quantize, plain::any_norm, plain::any_rotate, plain::any_silu,
    plain::any_add_rows, plain::any_dot_rows};
