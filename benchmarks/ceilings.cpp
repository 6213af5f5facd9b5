// What a processor with AVX2 can do at most; kernel_bandwidth.py compiles and calls this.
//
// Each function works on `threads` threads at once and returns something that depends on the work.
#include <immintrin.h>

#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int CHAINS = 12;  // independent sums: more than an instruction's latency, and they fit in registers

template <typename F>
int64_t on_threads(int64_t threads, const F &f) {
    std::vector<std::thread> all;
    std::vector<int64_t> found(threads);
    for (int64_t t = 1; t < threads; t++) all.emplace_back([&, t] { found[t] = f(t); });
    int64_t sum = f(0);
    for (int64_t t = 1; t < threads; t++) all[t - 1].join(), sum += found[t];
    return sum;
}

// Keep a vector in a register, and the compiler from knowing its value.
template <typename V>
inline void keep(V &vector) {
    asm volatile("" : "+x"(vector));
}

__attribute__((noinline)) int64_t sum_of(const uint8_t *from, int64_t size) {
    constexpr int VECTORS = 8;
    __m256i sum[VECTORS] = {};
    for (int64_t at = 0; at + 32 * VECTORS <= size; at += 32 * VECTORS)
        for (int v = 0; v < VECTORS; v++)
            sum[v] = _mm256_add_epi64(sum[v], _mm256_loadu_si256((const __m256i *)(from + at) + v));
    for (int v = 1; v < VECTORS; v++) sum[0] = _mm256_add_epi64(sum[0], sum[v]);
    return _mm256_extract_epi64(sum[0], 0);
}

// `number` times CHAINS vectors of 8 float32 products, added to a sum each. Where it is inlined, its sums may
// not be in registers.
__attribute__((noinline)) int64_t floats(int64_t number) {
    __m256 sum[CHAINS] = {}, a = _mm256_set1_ps(0.5f), b = a;
    for (int64_t i = 0; i < number; i++)
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++) sum[c] = _mm256_fmadd_ps(a, b, sum[c]), keep(sum[c]);
    return int64_t(sum[0][0] + sum[CHAINS - 1][0]);
}

// The same of 16 products of int16, added to int32 sums.
__attribute__((noinline)) int64_t integers(int64_t number) {
    __m256i sum[CHAINS] = {}, a = _mm256_set1_epi16(3), b = a;
    for (int64_t i = 0; i < number; i++)
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++) {
            keep(a);
            sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(a, b)), keep(sum[c]);
        }
    return int64_t(_mm256_extract_epi32(sum[0], 0) + _mm256_extract_epi32(sum[CHAINS - 1], 0));
}

}  // namespace

extern "C" {

// Read memory from beginning to end, each thread a part of its own.
int64_t read_memory(const uint8_t *from, int64_t size, int64_t threads) {
    return on_threads(threads, [&](int64_t t) { return sum_of(from + size / threads * t, size / threads); });
}

int64_t float_products(int64_t number, int64_t threads) {
    return on_threads(threads, [&](int64_t) { return floats(number); });
}

int64_t integer_products(int64_t number, int64_t threads) {
    return on_threads(threads, [&](int64_t) { return integers(number); });
}
}
