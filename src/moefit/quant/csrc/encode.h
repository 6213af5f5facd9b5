// What encode.cpp does for one group of a row, for those who find codes in another way.
#pragma once
#include <cstdint>

#include "matrix.h"

struct GroupCoder {
    // A row's weights from column `first` on, as floats; behind the row's end its last one is repeated.
    void (*read)(const Matrix &, int64_t row, int64_t first, float *w);
    // Scales and minima of so many groups [number, 64], where errors of each column count so much: `fitted`'s.
    void (*search)(int64_t bits, const float *w, const float *counts, int64_t number, float *scale, float *least);
    // 64 codes, a byte each, as a format has them.
    void (*pack)(int64_t bits, const uint8_t *code, uint8_t *out);
};

const GroupCoder &group_coder(int64_t level);
