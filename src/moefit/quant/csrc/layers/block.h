// The attention block of a decoder layer, as one call.
#pragma once
#include <cstdint>

#include "../attention.h"
#include "../latent.h"
#include "../products.h"

struct Router;

// sum = a + b, all of a kind.
void add_values(const Level &use, const void *a, const void *b, int64_t number, int64_t kind, void *sum);

extern "C" {

// What is different where heads attend to latents. `query_in`: the first of two layers of queries, or without rows.
struct Latents {
    LatentHeads heads;
    Linear query_in;
};

// Norms of queries and keys have the width of a head or of all heads; 0: there is none. `attention` has all but the
// strides of queries, which are consecutive. With `latents`, `key` makes the latents and the rotated parts of keys,
// `of_keys` is the norm of latents, `of_queries` that between the two layers of queries, and there is no `value`.
struct Block {
    Norm before, after, of_queries, of_keys;
    Linear query, key, value, output;
    Rotary rotary;
    int64_t angles;  // elements between the cosines of two tokens
    Attention attention;
    const Latents *latents;  // null: heads attend to keys and values
};

// What the router of `normed` makes; null: there is none.
struct Choice {
    const Router *router;
    void *logits_TE, *weights_TK;
    int64_t *ids_TK;
};

void moefit_block(int64_t level, const Block *block, const Segment *segments, int64_t number, const void *x,
                  int64_t tokens, const void *cos, const void *sin, void *sum, void *normed, const Choice *choice);
}

// The requests of a step: normed inputs of the attention [tokens, width], and cosines and sines of each token.
struct BlockInputs {
    const Segment *segments;
    int64_t number, tokens;
    const char *normed, *cos, *sin;
};

// What the output layer reads, [tokens, heads, value width]; keys and values of these tokens go to their caches.
void attend_latents(int64_t level, const Block &block, const BlockInputs &inputs, char *attended);

inline int64_t angle_bytes(const Rotary &rotary) { return bytes_of(rotary.in_turn ? int64_t(F32) : rotary.kind); }
