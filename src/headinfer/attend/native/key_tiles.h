/*
 * Keys and values as a matrix unit takes them: tiles of 16 tokens or rows x 64 bytes, in blocks that
 * are whole. Whoever includes this defines, besides HEAD_DIM, BLOCK: tokens of a block.
 */
#define TILES 1
#include "stored.h"
#define STEP 16 /* tokens of a tile of keys, rows of a group */
#define DIMS 32 /* of a tile */
#define CHUNKS (HEAD_DIM / DIMS)
#define TILE_BYTES 64 /* from row to row of a tile that is packed */

/* GCC does not know that tiles are loaded from memory: without this it may leave out what was stored. */
#define STORED() __asm__ volatile("" ::: "memory")
