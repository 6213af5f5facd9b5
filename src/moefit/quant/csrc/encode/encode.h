// Operations of encode.cpp on one group of a row, for other encoders.
#pragma once
#include <cstdint>

#include "../matrix.h"

struct GroupCoder {
    // A row's weights from column `first` on, as floats; past the row's end its last one is repeated.
    void (*read)(const Matrix &, int64_t row, int64_t first, float *w);
    // Scales and minima of so many groups [number, 64], with weights of the columns' errors, as of `fitted`.
    void (*search)(int64_t bits, const float *w, const float *counts, int64_t number, float *scale, float *least);
    // 64 codes, a byte each, in bit planes.
    void (*pack)(int64_t bits, const uint8_t *code, uint8_t *out);
};

const GroupCoder &group_coder(int64_t level);
