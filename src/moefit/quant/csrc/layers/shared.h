// An expert that every token passes through, beside those that a router chooses.
#pragma once
#include <cstdint>

#include "../products.h"

extern "C" {

// down(silu(gate(x)) * up(x)), times sigmoid(factor(x)) if `factor`, which has one row, is there (no rows: it is not).
struct SharedExpert {
    Linear gate, up, down, factor;
};
}

// y = the expert's output for x; all [tokens, width] and of a kind.
void shared_output(const Level &use, const SharedExpert &shared, const void *x, int64_t tokens, int64_t kind, void *y);
