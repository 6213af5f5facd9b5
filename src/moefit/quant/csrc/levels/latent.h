// Products of decoded rows, for latent attention (latent.cpp).
#pragma once
#include <cstdint>

// Rows [number, width] and some tokens; strides are in elements, and the width is a multiple of 16.
struct RowProduct {
    const float *rows;
    int64_t number, width;
    const float *x;
    int64_t x_token;
    float *y;
    int64_t y_token;
    int64_t tokens;
};
