/*
 * A processor's matrix unit (AMX), done in plain C: included before a kernel, so that it runs where
 * there is none. Registers have the rows and bytes that the kernel configures.
 */
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

struct unit_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static __thread struct unit_config unit_now;
static __thread uint8_t unit_tiles[8][16][64];

static void unit_configure(const void *config) {
    memcpy(&unit_now, config, sizeof unit_now);
    memset(unit_tiles, 0, sizeof unit_tiles);
}
static void unit_load(int tile, const void *from, int64_t stride) {
    if (unit_now.palette != 1) __builtin_trap();
    for (int row = 0; row < unit_now.rows[tile]; row++)
        memcpy(unit_tiles[tile][row], (const char *)from + row * stride, unit_now.row_bytes[tile]);
}
static void unit_store(int tile, void *to, int64_t stride) {
    if (unit_now.palette != 1) __builtin_trap();
    for (int row = 0; row < unit_now.rows[tile]; row++)
        memcpy((char *)to + row * stride, unit_tiles[tile][row], unit_now.row_bytes[tile]);
}
/* The earlier or the later bfloat16 of each pair in a row. */
static void unit_halves(const uint8_t *row, int late, float halves[16]) {
    for (int pair = 0; pair < 16; pair++) {
        uint32_t bits;
        memcpy(&bits, row + 4 * pair, sizeof bits);
        bits = late ? bits & 0xffff0000 : bits << 16;
        memcpy(&halves[pair], &bits, sizeof bits);
    }
}
/* to [rows][columns] += a [rows][pairs] x b [pairs][columns], in pairs of bfloat16 */
static void unit_multiply(int to, int a, int b) {
    for (int late = 0; late < 2; late++) {
        float left[16][16], right[16][16], sum[16];
        for (int row = 0; row < 16; row++) {
            unit_halves(unit_tiles[a][row], late, left[row]);
            unit_halves(unit_tiles[b][row], late, right[row]);
        }
        for (int row = 0; row < unit_now.rows[to]; row++) {
            memcpy(sum, unit_tiles[to][row], sizeof sum);
            for (int pair = 0; pair < unit_now.row_bytes[a] / 4; pair++)
                for (int column = 0; column < 16; column++)
                    sum[column] += left[row][pair] * right[pair][column];
            memcpy(unit_tiles[to][row], sum, unit_now.row_bytes[to]);
        }
    }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define syscall(...) 0 /* the system grants the unit */
#define _tile_loadconfig(config) unit_configure(config)
#define _tile_storeconfig(config) memcpy((void *)(config), &unit_now, sizeof unit_now)
#define _tile_release() memset(&unit_now, 0, sizeof unit_now)
#define _tile_zero(tile) memset(unit_tiles[tile], 0, sizeof unit_tiles[tile])
#define _tile_loadd(tile, from, stride) unit_load(tile, from, stride)
#define _tile_stored(tile, to, stride) unit_store(tile, to, stride)
#define _tile_dpbf16ps(to, a, b) unit_multiply(to, a, b)
