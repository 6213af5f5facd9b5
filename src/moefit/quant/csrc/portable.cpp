// Kernels for any processor.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"
#include "kinds.h"
#include "matrix.h"

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
constexpr int WIDEST = 1, UNROLL = 1;
constexpr bool SIGNED_BYTES = false;

template <int64_t KIND>
static inline __attribute__((always_inline)) VI product(VI sum, VB codes, int32_t four) {
    typedef uint32_t Words __attribute__((vector_size(64)));
    for (int i = 0; i < 4; i++) {
        VI code = (VI)(((Words)codes >> 8 * i) & 255);
        sum += code * int32_t(int8_t(four >> 8 * i));
    }
    return sum;
}

#include "slabs.inc"

static void any_dot(const Matrix &m, int64_t first, int64_t last, const Input *x, int64_t tokens,
                    float *const *y) {
    if (!any_slab_dot(m, first, last, x, tokens, y)) native_dot(m, first, last, x, tokens, y);
}
}

const Level PORTABLE = {plain::any_dot, plain::any_decode, plain::narrow, plain::widen, plain::integers,
                        plain::any_attend, plain::any_quantize};
