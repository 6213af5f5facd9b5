#include "tiles.h"

#ifdef TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "target.h"

namespace {

// Permission that Linux requires before tiles may be used (arch/x86/include/uapi/asm/prctl.h).
constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;

struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

const Configuration CONFIGURATION;  // not local: the compiler would not see that all of it is read

}  // namespace

bool tiles_here() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("amx-int8") &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

TARGET_BEGIN("amx-tile,amx-bf16")

void tiles_begin() { _tile_loadconfig(&CONFIGURATION); }

void tiles_end() { _tile_release(); }

// Tiles 0 to 3 are a square of sums, 32 on 32; 4 and 5 of the panel, 6 and 7 of x.
static inline void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

void add_tiles(const uint32_t *split, const uint32_t *x, int64_t padded, int64_t number, float *out) {
    constexpr int64_t BYTES = 4 * LANES, ROW = 64;
    for (int64_t m = 0; m < GROUP; m += WIDE)
        for (int64_t lane = 0; lane < LANES; lane += WIDE) {
            const uint32_t *a = split + m * number, *b = x + lane * padded;
            float *sum = out + m * LANES + lane;
            _tile_loadd(0, sum, BYTES);
            _tile_loadd(1, sum + 16, BYTES);
            _tile_loadd(2, sum + 16 * LANES, BYTES);
            _tile_loadd(3, sum + 16 * LANES + 16, BYTES);
            for (int64_t k = 0; k < number; k += DEEP, a += 4 * TILE, b += 4 * TILE) {
                _tile_loadd(6, b, ROW);
                _tile_loadd(7, b + TILE, ROW);
                _tile_loadd(4, a + LOW, ROW);
                _tile_loadd(5, a + LOW + TILE, ROW);
                multiply();
                _tile_loadd(4, a, ROW);
                _tile_loadd(5, a + TILE, ROW);
                multiply();
                _tile_loadd(6, b + LOW, ROW);
                _tile_loadd(7, b + LOW + TILE, ROW);
                multiply();
            }
            _tile_stored(0, sum, BYTES);
            _tile_stored(1, sum + 16, BYTES);
            _tile_stored(2, sum + 16 * LANES, BYTES);
            _tile_stored(3, sum + 16 * LANES + 16, BYTES);
        }
}

TARGET_END

void split_panel(const float *panel, int64_t number, uint32_t *split) {
    for (int64_t first = 0; first < GROUP; first += WIDE)
        for (int64_t k = 0; k < number; k += DEEP, split += 4 * TILE) {
            uint16_t *high = reinterpret_cast<uint16_t *>(split), *low = high + 2 * LOW;
            for (int64_t m = 0; m < WIDE; m++)
                for (int64_t i = 0; i < DEEP; i++) {
                    float x = panel[(k + i) * GROUP + first + m], rounded;
                    uint32_t word = uint32_t(to_bfloat16(x)) << 16;
                    std::memcpy(&rounded, &word, 4);
                    high[m * DEEP + i] = uint16_t(word >> 16);
                    low[m * DEEP + i] = to_bfloat16(x - rounded);
                }
        }
}

#else

bool tiles_here() { return false; }
void tiles_begin() {}
void tiles_end() {}
void split_panel(const float *, int64_t, uint32_t *) {}
void add_tiles(const uint32_t *, const uint32_t *, int64_t, int64_t, float *) {}

#endif
