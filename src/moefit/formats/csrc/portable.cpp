// Any processor.
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

#include "attention.inc"
}

const Level PORTABLE = {plain::any_dot, plain::any_decode, plain::narrow, plain::widen, plain::integers,
                        plain::any_attend};
