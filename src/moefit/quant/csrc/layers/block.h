// The attention block of a decoder layer, as one call.
#pragma once
#include <cstdint>

#include "../attention.h"

struct Block;
struct Router;

// sum = a + b, all float32 or all bfloat16 (kind).
void add_values(const void *a, const void *b, int64_t number, int64_t kind, void *sum);

extern "C" {

// What the router of `normed` makes; null: there is none.
struct Choice {
    const Router *router;
    void *logits_TE, *weights_TK;
    int64_t *ids_TK;
};

void moefit_block(int64_t level, const Block *block, const Segment *segments, int64_t number, const void *x,
                  int64_t tokens, const void *cos, const void *sin, void *sum, void *normed, const Choice *choice);
}
