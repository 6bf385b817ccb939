/*
 * Attention of up to 256 query rows to many keys: `decode.c` where there are more than few.
 *
 * With more rows each key and value is multiplied so often that reading is no longer all there is to
 * do. So each block is packed for matrix products, as in `prefill.c`, but a small one, which stays in
 * the nearest caches, and while one panel is multiplied a later one is fetched from memory.
 *
 * Compiled for one HEAD_DIM (a multiple of 16), ROWS and element type at a time. More than 16 ROWS
 * are a maximum: their number is known when it runs, so that one library serves every draft.
 */
#include <math.h>

#define TILES 0
#define BLOCK 128
#if ROWS > 16 /* any number of rows up to ROWS: a multiple of few is multiplied at a time */
#define ROWS_OF(rows) (rows)
#if !defined(__AVX512F__) /* 16 registers */
#define ROWS_AT_ONCE 6
#define VECTORS 2
#elif HEAD_DIM % 32
#define ROWS_AT_ONCE 16
#define VECTORS 1
#else
#define ROWS_AT_ONCE 8
#define VECTORS 2
#endif
#elif defined(__AVX512F__) /* 32 registers */
#define ROWS_AT_ONCE ROWS
#define VECTORS 1 /* two read 8% less: the panels are the steps in which memory is asked for more */
#else /* for 6 rows at most */
#define ROWS_AT_ONCE ((ROWS + (ROWS + 5) / 6 - 1) / ((ROWS + 5) / 6))
#define VECTORS 2
#endif
#define PADDED_TO(rows) (((rows) + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * ROWS_AT_ONCE)
#define PADDED PADDED_TO(ROWS)

#include "panels.h"

/*
 * Rows from which this is faster than `decode.c`. (A core of an EPYC with AVX-512 multiplies 49 to 59
 * instead of 34 to 50 billion pairs of bfloat16 a second for 4 to 8 rows, but 22 to 34 instead of 31
 * to 41 of float32. `decode.c` holds no more than 8.)
 */
int fewest_rows(void) { return PAIRS ? 4 : 9; }

#define KEY_PANELS (BLOCK / PANEL)
#define VALUE_PANELS (HEAD_DIM / PANEL)

/* What one stretch of keys is attended in. */
struct state {
    operand query[PADDED][DIM_STEPS];
    operand keys[DIM_STEPS][PANEL];
    operand values[BLOCK_STEPS][PANEL];
    float scores[PADDED][BLOCK];
    operand weights[PADDED][BLOCK_STEPS];
    float out[PADDED][HEAD_DIM];
    float highest[ROWS], total[ROWS];
    element room[ROOM][HEAD_DIM]; /* keys or values that are not as they are stored */
} __attribute__((aligned(64)));

/* Scores of a block's keys, while its values are fetched. */
static void score_block(struct state *s, const element *keys, const stored *values, int64_t count,
                        int64_t rows) {
    for (int panel = 0; panel < KEY_PANELS; panel++) {
        pack_keys(keys + panel * PANEL * HEAD_DIM, count - panel * PANEL, s->keys);
        const stored *fetched = panel * PANEL < count ? values + panel * PANEL * REST : 0;
        for (int64_t row = 0; row < rows; row += ROWS_AT_ONCE)
            multiply_panel(s->query[row], DIM_STEPS, s->keys[0], DIM_STEPS,
                           s->scores[row] + panel * PANEL, BLOCK, 0,
                           row ? 0 : (const char *)fetched);
    }
}

/* Turn scores into weights; shrink what was summed under lower ones. */
static void weigh_block(struct state *s, int64_t count, float scale, int64_t rows) {
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t token = count; token < BLOCK; token++) s->scores[row][token] = -INFINITY;
        float shrink =
            weigh(s->scores[row], s->weights[row], scale, s->highest + row, s->total + row);
        if (shrink != 1)
            for (int dim = 0; dim < HEAD_DIM; dim++) s->out[row][dim] *= shrink;
    }
}

/* Add the weighted values of a block, while the `next` keys, if any, are fetched. */
static void add_values(struct state *s, const element *values, int64_t count, const char *next,
                       int64_t rows) {
    for (int panel = 0; panel < VALUE_PANELS; panel++) {
        pack_values(values + panel * PANEL, count, s->values);
        const char *fetched = next ? next + panel * BLOCK_STEPS * STEP_BYTES : 0;
        for (int64_t row = 0; row < rows; row += ROWS_AT_ONCE)
            multiply_panel(s->weights[row], BLOCK_STEPS, s->values[0], BLOCK_STEPS,
                           s->out[row] + panel * PANEL, HEAD_DIM, 1, row ? 0 : fetched);
    }
}

/* A query row's elements, as operands; they were of the element's type before. */
INLINE operand query_of(const float *query, int step) {
#if PAIRS
    uint32_t bits[2];
    memcpy(bits, query + 2 * step, sizeof bits);
    return bits[0] >> 16 | (bits[1] & 0xffff0000);
#else
    return query[step];
#endif
}

/* Begin with nothing attended; rows that are multiplied in vain are zeros. */
static void begin(struct state *s, const float *query, int64_t rows) {
    int64_t padded = PADDED_TO(rows);
    memset(s->out, 0, padded * sizeof *s->out);
    memset(s->query[rows], 0, (padded - rows) * sizeof *s->query);
    memset(s->weights[rows], 0, (padded - rows) * sizeof *s->weights);
    for (int64_t row = 0; row < rows; row++) {
        s->highest[row] = NOTHING;
        s->total[row] = 0;
        for (int step = 0; step < DIM_STEPS; step++)
            s->query[row][step] = query_of(query + row * HEAD_DIM, step);
    }
}

/* Attend queries to `count` keys from `first` on; out [rows][HEAD_DIM], lse [rows]. */
static void attend_part(const float *query, const stored *keys, const stored *values, int64_t first,
                        int64_t count, float scale, float *out, float *lse, int64_t rows) {
    struct state s;
    begin(&s, query, rows);
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t left = count - start, now = left < BLOCK ? left : BLOCK;
        int64_t at = first + start;
        const stored *these = values + at * ROW, *those = keys + (at + BLOCK) * ROW;
        const element *k = rows_of(keys, at, now, s.room, these);
        score_block(&s, k, these + FETCHED, now, rows);
        weigh_block(&s, now, scale * LOG2_E, rows);
        const element *v = rows_of(values, at, now, s.room, those);
        add_values(&s, v, now, left > BLOCK ? (const char *)(those + FETCHED) : 0, rows);
    }
    for (int64_t row = 0; row < rows; row++) {
        lse[row] = (s.highest[row] + log2f(s.total[row])) * LN_2;
        for (int dim = 0; dim < HEAD_DIM; dim++)
            out[row * HEAD_DIM + dim] = s.out[row][dim] / s.total[row];
    }
}

#include "heads.h"
