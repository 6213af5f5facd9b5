// Latent attention (MLA) over the latents themselves (latent.cpp).
#pragma once
#include <cstdint>

#include "matrix.h"

extern "C" {

// The rows of the matrix are, for each head, `keys` of W_K and `values` of W_V, of `latent` columns; a multiple of 16.
struct LatentHeads {
    Matrix matrix;
    int64_t heads, keys, values, latent, rotated;
};

void moefit_latent_queries(int64_t level, const LatentHeads *heads, const void *query, int64_t kind, int64_t tokens, float *y);
void moefit_latent_values(int64_t level, const LatentHeads *heads, const float *x, int64_t kind, int64_t tokens, void *y);
}
