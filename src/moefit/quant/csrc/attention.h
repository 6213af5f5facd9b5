// Attention over keys and values of several requests as they lie in their cache.
//
// An output is summed in an order that depends on the request's positions alone: keys in spans of SPAN
// places from the request's first, spans one after the other. So neither threads nor neighbours nor the
// cutting of a prompt changes a bit of it. engine/packed.py has the plain form that tests compare with.
#pragma once
#include <cstdint>

constexpr int64_t SPAN = 512;  // keys that are summed up before they join the others
constexpr int64_t PART = 64;   // keys whose scores are held at once
constexpr int64_t ROWS = 32;   // queries of one KV head that go over the keys together

// Strides are counted in elements. Widths are multiples of 16.
struct Attention {
    int64_t heads, groups, width, value_width, kind;
    int64_t query_token, query_head, key_group, key_token, value_group, value_token;
    int64_t window;         // keys that a query sees, its own included; 0: all before it
    float scale, softcap;   // softcap 0: none
    const float *sinks;     // null, or a score per query head that has no value
};

// `fresh` queries of one request, rows `row` on; the first stands behind `past` keys.
struct Segment {
    const void *keys, *values;
    int64_t past, fresh, row;
};

// Queries of one KV head, and where each stands among the keys.
struct QueryRows {
    int64_t number;
    const float *query;  // [number, width]
    int64_t position[ROWS], head[ROWS];
};

// What a row has seen so far: the largest score, the sum of exponentials and of values weighted by them.
struct Seen {
    float largest[ROWS], sum[ROWS];
    float *value;  // [ROWS, value_width]
};
