// What a processor with AVX2 and wider instructions can do at most; kernel_bandwidth.py compiles and calls this.
//
// Each function works on `threads` threads at once and returns something that depends on the work.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

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

// The same of 16 float32 products, 32 of bfloat16 and 64 of bytes, with AVX-512.
#define WIDE(NAME, TARGET, VECTOR, START, STEP)                                        \
    __attribute__((noinline, target(TARGET))) int64_t NAME(int64_t number) {           \
        VECTOR sum[CHAINS] = {};                                                       \
        auto a = START, b = a;                                                         \
        for (int64_t i = 0; i < number; i++)                                           \
            _Pragma("GCC unroll 12") for (int c = 0; c < CHAINS; c++) {                \
                sum[c] = STEP(sum[c], a, b);                                           \
                asm volatile("" : "+v"(sum[c]));                                       \
            }                                                                          \
        return int64_t(sum[0][0] + sum[CHAINS - 1][0]);                                \
    }
#define FMADD(sum, a, b) _mm512_fmadd_ps(a, b, sum)
WIDE(wide_floats, "avx512f", __m512, _mm512_set1_ps(0.5f), FMADD)
WIDE(wide_bfloats, "avx512f,avx512bf16", __m512, (__m512bh)_mm512_set1_epi16(0x3f00), _mm512_dpbf16_ps)
WIDE(wide_bytes, "avx512f,avx512vnni", __m512i, _mm512_set1_epi8(3), _mm512_dpbusd_epi32)

struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

const Configuration CONFIGURATION;

// `number` times four products of tiles, 16 x 16 sums of 64 bytes or of 32 bfloat16 each.
#define TILES(NAME, TARGET, STEP)                                                      \
    __attribute__((noinline, target(TARGET))) int64_t NAME(int64_t number) {           \
        alignas(64) int32_t tile[256] = {};                                            \
        asm volatile("" : : "r"(&CONFIGURATION), "r"(tile) : "memory");                \
        _tile_loadconfig(&CONFIGURATION);                                              \
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);                    \
        _tile_loadd(4, tile, 64); _tile_loadd(5, tile, 64);                            \
        _tile_loadd(6, tile, 64); _tile_loadd(7, tile, 64);                            \
        for (int64_t i = 0; i < number; i++) {                                         \
            STEP(0, 4, 6); STEP(1, 4, 7); STEP(2, 5, 6); STEP(3, 5, 7);                \
        }                                                                              \
        _tile_stored(0, tile, 64);                                                     \
        _tile_release();                                                               \
        return tile[0];                                                                \
    }
TILES(tile_bytes, "amx-tile,amx-int8", _tile_dpbssd)
TILES(tile_bfloats, "amx-tile,amx-bf16", _tile_dpbf16ps)

}  // namespace

extern "C" {

// Which of the wide products below this processor has, from the first on a bit each.
int64_t wide_products_here() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    __builtin_cpu_init();
    bool allowed = __builtin_cpu_supports("amx-tile") && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
    return (__builtin_cpu_supports("avx512f") ? 1 : 0) | (__builtin_cpu_supports("avx512bf16") ? 2 : 0) |
           (__builtin_cpu_supports("avx512vnni") ? 4 : 0) | (allowed && __builtin_cpu_supports("amx-bf16") ? 8 : 0) |
           (allowed && __builtin_cpu_supports("amx-int8") ? 16 : 0);
}

int64_t wide_float_products(int64_t number, int64_t threads) {
    return on_threads(threads, [&](int64_t) { return wide_floats(number); });
}

int64_t wide_bfloat16_products(int64_t number, int64_t threads) {
    return on_threads(threads, [&](int64_t) { return wide_bfloats(number); });
}

int64_t wide_byte_products(int64_t number, int64_t threads) {
    return on_threads(threads, [&](int64_t) { return wide_bytes(number); });
}

int64_t tile_bfloat16_products(int64_t number, int64_t threads) {
    return on_threads(threads, [&](int64_t) { return tile_bfloats(number); });
}

int64_t tile_byte_products(int64_t number, int64_t threads) {
    return on_threads(threads, [&](int64_t) { return tile_bytes(number); });
}

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
