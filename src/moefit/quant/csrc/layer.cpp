// C interface: norms, rotary embeddings and the router's choice, of all tokens of a step.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kinds.h"
#include "matrix.h"
#include "pool.h"
#include "products.h"
#include "levels/rounding.h"

namespace {

constexpr int64_t ENOUGH = 1 << 15;  // elements that are worth a thread's while

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

// How a router chooses, as moe/scoring.py's ScoringRule does; `bias` and `factor` are null or [experts].
struct Routing {
    int64_t experts, chosen, kind, weights_kind;
    int64_t score, weighting, by_logits, rounded;
    int64_t groups, kept_groups, two_of_group;  // a group's score is its largest, or the sum of its two largest
    float scale;
    const float *bias, *factor;
};

enum Score : int64_t { SOFTMAX, SIGMOID, SQRT_SOFTPLUS, GIVEN };
enum Weighting : int64_t { KEPT, NORMALISED, SOFTMAX_OF_CHOSEN };

// In double precision, which is then rounded once: the same on every processor.
void softmax(const float *x, int64_t number, float *out) {
    double total = 0;
    float most = x[0];
    for (int64_t i = 0; i < number; i++) most = x[i] > most || x[i] != x[i] ? x[i] : most;
    std::vector<double> shares(number);
    for (int64_t i = 0; i < number; i++) total += shares[i] = std::exp(double(x[i]) - most);
    for (int64_t i = 0; i < number; i++) out[i] = float(shares[i] / total);
}

void scores_of(const Routing &r, const float *logits, float *out) {
    if (r.score == SOFTMAX) softmax(logits, r.experts, out);
    for (int64_t e = 0; e < r.experts; e++) {
        double x = logits[e];
        if (r.score == GIVEN) out[e] = logits[e];
        if (r.score == SIGMOID) out[e] = float(1 / (1 + std::exp(-x)));
        if (r.score == SQRT_SOFTPLUS) out[e] = std::sqrt(x > 20 ? logits[e] : float(std::log1p(std::exp(x))));
        if (r.rounded) out[e] = rounded(out[e], r.kind);
    }
}

bool greater(float a, float b) { return a > b || (a != a && b == b); }  // NaN is the greatest

// The indices of the greatest values, in descending order. Of equal values those that torch's topk takes, which
// selects with the same algorithms of the standard library.
void greatest(const float *values, int64_t number, int64_t wanted, int64_t *ids) {
    static thread_local std::vector<std::pair<float, int64_t>> queue;
    queue.resize(number);
    for (int64_t i = 0; i < number; i++) queue[i] = {values[i], i};
    auto before = [](const auto &a, const auto &b) { return greater(a.first, b.first); };
    auto begin = queue.begin();
    if (wanted * 64 <= number) {
        std::partial_sort(begin, begin + wanted, queue.end(), before);
    } else {
        std::nth_element(begin, begin + wanted - 1, queue.end(), before);
        std::sort(begin, begin + wanted - 1, before);
    }
    for (int64_t k = 0; k < wanted; k++) ids[k] = queue[k].second;
}

// Set the preference for experts outside the best groups to minus infinity.
void keep_groups(const Routing &r, float *preference) {
    int64_t size = r.experts / r.groups, two = std::min<int64_t>(r.two_of_group ? 2 : 1, size), best[2];
    std::vector<float> score(r.groups);
    std::vector<int64_t> kept(r.groups);
    for (int64_t g = 0; g < r.groups; g++) {
        greatest(preference + g * size, size, two, best);
        score[g] = preference[g * size + best[0]] + (two > 1 ? preference[g * size + best[1]] : 0);
    }
    greatest(score.data(), r.groups, r.kept_groups, kept.data());
    for (int64_t g = 0; g < r.groups; g++)
        if (std::find(kept.begin(), kept.begin() + r.kept_groups, g) == kept.begin() + r.kept_groups)
            std::fill(preference + g * size, preference + (g + 1) * size, -INFINITY);
}

void weights_of(const Routing &r, const float *logits, const float *scores, const int64_t *ids, float *out) {
    float total = 0;
    for (int64_t k = 0; k < r.chosen; k++) {
        out[k] = r.weighting == SOFTMAX_OF_CHOSEN ? logits[ids[k]] : scores[ids[k]];
        total += out[k];
    }
    if (r.weighting == SOFTMAX_OF_CHOSEN) softmax(out, r.chosen, out);
    for (int64_t k = 0; k < r.chosen; k++) {
        if (r.weighting == NORMALISED) out[k] /= total < 1e-20f ? 1e-20f : total;
        if (r.factor) out[k] *= r.factor[ids[k]];
        out[k] *= r.scale;
    }
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
        int64_t angle = (b * all->angle_batch + t * all->angle_token) * (form.in_turn ? 4 : bytes);
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

void moefit_route(const Routing *r, const void *logits_TE, int64_t tokens, void *weights_TK, int64_t *ids_TK) {
    each_row(tokens, 16 * r->experts, [&](int64_t t) {
        static thread_local std::vector<float> logits, scores, preference, weights;
        logits.resize(r->experts), scores.resize(r->experts), preference.resize(r->experts), weights.resize(r->chosen);
        for (int64_t e = 0; e < r->experts; e++) logits[e] = load(logits_TE, r->kind, t * r->experts + e);
        scores_of(*r, logits.data(), scores.data());
        for (int64_t e = 0; e < r->experts; e++)
            preference[e] = (r->by_logits ? logits[e] : scores[e]) + (r->bias ? r->bias[e] : 0);
        if (r->groups > 1) keep_groups(*r, preference.data());
        int64_t *ids = ids_TK + t * r->chosen;
        greatest(preference.data(), r->experts, r->chosen, ids);
        weights_of(*r, logits.data(), scores.data(), ids, weights.data());
        for (int64_t k = 0; k < r->chosen; k++) store(weights[k], weights_TK, r->weights_kind, t * r->chosen + k);
    });
}

// A router: logits = x W^T + bias, computed in `product` (float32, or the kind of x) and rounded to the kind of the
// rule's logits, and the choice.
struct Router {
    Matrix matrix;
    const float *bias;  // null: none
    int64_t product;
    Routing rule;
};

// x: [tokens, width], of a kind.
void moefit_router(int64_t level, const Router *router, const void *x, int64_t kind, int64_t tokens, void *logits_TE,
                   void *weights_TK, int64_t *ids_TK) {
    const Level &use = level_of(level);
    const Routing &rule = router->rule;
    int64_t size = tokens * router->matrix.cols, made = tokens * rule.experts;
    std::vector<float> widened(router->product == kind ? 0 : size), wide(router->product == rule.kind ? 0 : made);
    if (!widened.empty()) use.widen(x, kind, size, widened.data(), size);
    void *product = wide.empty() ? logits_TE : wide.data();
    Product one = {&router->matrix, router->bias, product};
    multiply(use, &one, 1, widened.empty() ? x : widened.data(), tokens, router->product);
    for (int64_t i = 0; i < made && !wide.empty(); i++)
        store(load(wide.data(), router->product, i), logits_TE, rule.kind, i);
    moefit_route(&rule, logits_TE, tokens, weights_TK, ids_TK);
}
}
