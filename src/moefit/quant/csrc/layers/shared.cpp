// C interface: functions of each element, and experts that every token passes through.
//
// Values are rounded where torch rounds those of a family's own modules, and a row's values do not depend on other rows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "block.h"
#include "shared.h"
#include "../kinds.h"
#include "../pool.h"
#include "../levels/rounding.h"

namespace {

constexpr int64_t PART = 1 << 12;  // elements that a thread takes at a time

enum Function : int64_t { SILU, SIGMOID };

// What torch computes for a single element, which it does with the same function of the C library.
float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

// Call `f(first, number, floats)` for parts of a number of elements. `floats` has room for two parts.
template <typename F>
void each_part(int64_t number, const F &f) {
    each((number + PART - 1) / PART, [&](int64_t item) {
        static thread_local std::vector<float> floats;
        floats.resize(2 * PART);
        f(item * PART, std::min(PART, number - item * PART), floats.data());
    });
}

// gate = silu(gate) * up.
void hidden_units(const Level &use, char *gate, const char *up, int64_t number, int64_t kind) {
    each_part(number, [&](int64_t first, int64_t width, float *floats) {
        char *to = gate + first * bytes_of(kind);
        use.widen(to, kind, width, floats, width);
        use.widen(up + first * bytes_of(kind), kind, width, floats + PART, width);
        use.silu(floats, floats + PART, width, kind);
        use.narrow(floats, kind, width, to);
    });
}

// y = sigmoid(factor) * y, of each token.
void scale(const Level &use, const char *factor, char *y, int64_t tokens, int64_t width, int64_t kind) {
    std::vector<float> values(width);
    for (int64_t t = 0; t < tokens; t++) {
        char *row = y + t * width * bytes_of(kind);
        float value = rounded(sigmoid(load(factor, kind, t)), kind);
        use.widen(row, kind, width, values.data(), width);
        for (float &one : values) one *= value;
        use.narrow(values.data(), kind, width, row);
    }
}

}  // namespace

void shared_output(const Level &use, const SharedExpert &shared, const void *x, int64_t tokens, int64_t kind, void *y) {
    int64_t width = shared.gate.matrix.rows, size = bytes_of(kind), factors = shared.factor.matrix.rows;
    std::unique_ptr<char[]> gate(new char[tokens * width * size]), up(new char[tokens * width * size]);
    std::unique_ptr<char[]> factor(new char[tokens * size]);
    Product inner[3] = {{&shared.gate.matrix, shared.gate.bias, gate.get()},
                        {&shared.up.matrix, shared.up.bias, up.get()},
                        {&shared.factor.matrix, shared.factor.bias, factor.get()}};
    multiply(use, inner, factors ? 3 : 2, x, tokens, kind);
    hidden_units(use, gate.get(), up.get(), tokens * width, kind);
    Product down = {&shared.down.matrix, shared.down.bias, y};
    multiply(use, &down, 1, gate.get(), tokens, kind);
    if (factors) scale(use, factor.get(), (char *)y, tokens, shared.down.matrix.rows, kind);
}

extern "C" {

// y = function(x) of each element, both of a kind.
void moefit_elementwise(int64_t level, int64_t function, const void *x, int64_t number, int64_t kind, void *y) {
    const Level &use = level_of(level);
    each_part(number, [&](int64_t first, int64_t width, float *floats) {
        int64_t at = first * bytes_of(kind);
        use.widen((const char *)x + at, kind, width, floats, width);
        if (function == SILU) use.silu(floats, nullptr, width, kind);
        else for (int64_t i = 0; i < width; i++) floats[i] = sigmoid(floats[i]);
        use.narrow(floats, kind, width, (char *)y + at);
    });
}

// y = y + the shared expert's output for x; [tokens, width], all of a kind.
void moefit_add_shared(int64_t level, const SharedExpert *shared, const void *x, int64_t tokens, int64_t kind, void *y) {
    int64_t number = tokens * shared->down.matrix.rows;
    std::unique_ptr<char[]> made(new char[number * bytes_of(kind)]);
    shared_output(level_of(level), *shared, x, tokens, kind, made.get());
    add_values(level_of(level), y, made.get(), number, kind, y);
}
}
