/*
 * The processor's matrix unit (AMX), where TILES is 1: eight registers of 16 rows x 64 bytes.
 * Where it is 0 nothing has to be asked for, set or given back.
 */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

#if TILES
#include <sys/syscall.h>
#include <unistd.h>

/* Ask the system for the matrix unit's registers, once for the process; 0 where it refuses. */
int prepare(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/* Other code of this thread may rely on its own setting, so it is given back. */
INLINE void begin_tiles(struct tile_config *before) {
    struct tile_config ours = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) ours.rows[tile] = 16, ours.row_bytes[tile] = 64;
    _tile_storeconfig(before);
    _tile_loadconfig(&ours);
}
INLINE void end_tiles(struct tile_config *before) {
    if (before->palette)
        _tile_loadconfig(before);
    else
        _tile_release();
}
#else
int prepare(void) { return 1; }
INLINE void begin_tiles(struct tile_config *before) { (void)before; }
INLINE void end_tiles(struct tile_config *before) { (void)before; }
#endif
