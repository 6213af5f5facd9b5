// Kernels for any processor.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../attention.h"
#include "../kinds.h"
#include "../matrix.h"

namespace plain {
#include "plain.inc"
#include "inputs.inc"
typedef float V __attribute__((vector_size(64)));

static inline V muladd(V a, V b, V c) { return a * b + c; }

static inline V halves16(const uint16_t *at) {
    V value;
    for (int i = 0; i < 16; i++) value[i] = from_half(at[i]);
    return value;
}

static inline V bytes16(const int8_t *at) {
    V value;
    for (int i = 0; i < 16; i++) value[i] = at[i];
    return value;
}

#include "attention.inc"

typedef uint8_t VB __attribute__((vector_size(64)));
typedef VI RI;
typedef V RV;

static inline RV row_halves(const uint16_t *at) { return halves16(at); }
static inline RV row_muladd(RV a, RV b, RV c) { return muladd(a, b, c); }

constexpr int WIDEST = 1, UNROLL = 1;
constexpr bool SIGNED_BYTES = false;

template <int64_t KIND>
static inline __attribute__((always_inline)) RI product(RI sum, VB codes, int32_t four) {
    typedef uint32_t Words __attribute__((vector_size(64)));
    for (int i = 0; i < 4; i++) {
        VI code = (VI)(((Words)codes >> 8 * i) & 255);
        sum += code * int32_t(int8_t(four >> 8 * i));
    }
    return sum;
}

#include "slabs.inc"

static void any_dot(const Matrix &m, int64_t first, int64_t last, const Panel &panel, float *const *y) {
    if (any_slab_dot(m, first, last, panel, y)) return;
    for (int64_t t = 0; t < panel.tokens; t += TOKENS)
        native_dot(m, first, last, panel.x + t, std::min(TOKENS, panel.tokens - t), y + t);
}
}

const Level PORTABLE = {plain::any_dot, plain::token_bytes, plain::pack, plain::any_decode, plain::narrow, plain::narrow,
    plain::widen, plain::integers, plain::any_attend, plain::any_quantize};
