// Linear layers of the same inputs, computed together, and experts.
#pragma once
#include "matrix.h"

struct Product {
    const Matrix *m;
    const float *bias;  // null: none
    void *y_TO;
};

// y_TO = x_TI W^T + bias of each product, tokens and results of a kind. Results do not depend on which
// products are computed together.
void multiply(const Level &use, const Product *products, int64_t number, const void *x_TI, int64_t tokens, int64_t kind);

extern "C" {

// A linear layer.
struct Linear {
    Matrix matrix;
    const float *bias;  // null: none
};

// One expert: its matrices, its routed rows first to first + rows - 1, and the biases of both, null if it has none.
struct Expert {
    Matrix in, down;
    int64_t first, rows;
    const void *in_bias, *down_bias;
    int64_t bias_kind;
};
}
