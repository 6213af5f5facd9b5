// C interface: norms and rotary embeddings of all tokens of a step.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "matrix.h"
#include "pool.h"
#include "rounding.h"

namespace {

constexpr int64_t ENOUGH = 1 << 15;  // elements that are worth a thread's while

int64_t bytes_of(int64_t kind) { return kind == F32 ? 4 : 2; }

// Call `f` for rows 0 to number - 1, on several threads if there are many.
template <typename F>
void each_row(int64_t number, int64_t width, const F &f) {
    int64_t share = std::max<int64_t>(1, ENOUGH / std::max<int64_t>(1, width));
    if (number <= share) {
        for (int64_t row = 0; row < number; row++) f(row);
        return;
    }
    each((number + share - 1) / share, [&](int64_t item) {
        for (int64_t row = item * share; row < std::min((item + 1) * share, number); row++) f(row);
    });
}

}  // namespace

extern "C" {

// x and y: [rows, width], consecutive.
void moefit_norm(int64_t level, const Norm *n, const void *x, int64_t rows, void *y) {
    const Level &use = level_of(level);
    int64_t bytes = n->width * bytes_of(n->kind);
    each_row(rows, n->width, [&](int64_t row) { use.norm(*n, (const char *)x + row * bytes, (char *)y + row * bytes); });
}

// Queries or keys, [batch, heads, tokens, size]. Strides are in elements; elements of a head after the rotated ones are
// copied.
struct Heads {
    int64_t heads, size, x_batch, x_head, x_token, y_batch, y_head, y_token;
};

// Cosines and sines are [batch, tokens, ...] with the same strides.
struct Rotation {
    Rotary form;
    int64_t batch, tokens, angle_batch, angle_token;
    Heads heads[2];  // the second has no heads if there is one tensor
};

// x and y: the tensors and results of `heads`.
void moefit_rotate(int64_t level, const Rotation *all, const void *cos, const void *sin, const void *x0, void *y0,
                   const void *x1, void *y1) {
    const Level &use = level_of(level);
    const Rotary &form = all->form;
    const void *from[2] = {x0, x1};
    void *to[2] = {y0, y1};
    int64_t bytes = bytes_of(form.kind), width = 0;
    for (const Heads &one : all->heads) width += one.heads * one.size;
    each_row(all->batch * all->tokens, width, [&](int64_t row) {
        int64_t b = row / all->tokens, t = row % all->tokens;
        int64_t angle = (b * all->angle_batch + t * all->angle_token) * bytes;
        for (int n = 0; n < 2; n++) {
            const Heads &one = all->heads[n];
            for (int64_t h = 0; h < one.heads; h++) {
                const char *x = (const char *)from[n] + (b * one.x_batch + h * one.x_head + t * one.x_token) * bytes;
                char *y = (char *)to[n] + (b * one.y_batch + h * one.y_head + t * one.y_token) * bytes;
                use.rotate(form, (const char *)cos + angle, (const char *)sin + angle, x, y);
                std::memcpy(y + form.width * bytes, x + form.width * bytes, (one.size - form.width) * bytes);
            }
        }
    });
}
}
