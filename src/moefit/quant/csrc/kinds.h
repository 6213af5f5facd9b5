// Dispatch on a matrix's kind, and single elements of a kind of activations, where there are too few for a level's
// operations.
#pragma once
#include <cstdint>
#include <cstring>

#include "half.h"
#include "matrix.h"

#define FOR_KIND(kind, call)                                                                       \
    switch (kind) {                                                                                \
        case F32: call(F32); break;                                                                \
        case BF16: call(BF16); break;                                                              \
        case F16: call(F16); break;                                                                \
        case FP8: call(FP8); break;                                                                \
        case INT2: call(INT2); break;                                                              \
        case INT3: call(INT3); break;                                                              \
        case INT4: call(INT4); break;                                                              \
        case INT5: call(INT5); break;                                                              \
        case INT6: call(INT6); break;                                                              \
        case INT8: call(INT8); break;                                                              \
    }

inline float load(const void *from, int64_t kind, int64_t at) {
    if (kind == F32) return ((const float *)from)[at];
    uint16_t half = ((const uint16_t *)from)[at];
    if (kind == F16) return from_half(half);
    uint32_t word = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

inline void store(float value, void *to, int64_t kind, int64_t at) {
    if (kind == F32) ((float *)to)[at] = value;
    else ((uint16_t *)to)[at] = kind == F16 ? half_of(value) : to_bfloat16(value);
}

inline float rounded(float value, int64_t kind) {
    uint16_t half;
    if (kind == F32) return value;
    store(value, &half, kind, 0);
    return load(&half, kind, 0);
}
