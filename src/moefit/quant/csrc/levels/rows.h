// Operations of a layer between its products: norms and rotary embeddings.
//
// Results are rounded where the families' own modules round. Each row is computed by itself, in an order that
// depends on its width alone. quant/layers/layer_operations.py has the references that tests compare with.
#pragma once
#include <cstdint>

// y = x / sqrt(mean of squares + eps) * (weight + added), rounded to `kind`.
struct Norm {
    const void *weight;  // null: none
    int64_t width, kind, weight_kind;
    int64_t round_first;  // whether x / sqrt(...) is rounded to `kind` before it is multiplied
    float eps, added;     // `added` is 0 or 1
};

// Rotates pairs (a, b) of a head's first `width` elements: a cos - b sin, b cos + a sin. Cosines and sines are of `kind`
// like every product, or `in_turn`: the cosine and the sine of each pair, in float32 as products and sums.
struct Rotary {
    int64_t width, kind;
    int64_t pairs_in;   // whether a pair is two neighbours; else it is i and i + width / 2
    int64_t pairs_out;  // the same for the result
    int64_t second;     // where the cosines and sines of the second elements begin: at 0 or at width / 2
    int64_t in_turn;
};
