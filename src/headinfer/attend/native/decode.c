/*
 * Attention of a few query rows to many keys, with the log-sum-exp: the shape of a decode step.
 *
 * Such a step reads each key and value once and does little with it, so the aim is to read at the
 * speed of memory. Compiled for one head_dim, number of rows and element type at a time, by the
 * definitions HEAD_DIM (a multiple of LANES), ROWS (1 to 8) and the element type.
 */
#include <math.h>

#include "elements.h"

#define CHUNKS (HEAD_DIM / LANES)
#define BLOCK 64                        /* tokens of a block, which stays in the nearest caches */
#include "stored.h"
#define SLOTS (ROWS <= 1 ? 1 : ROWS <= 2 ? 2 : ROWS <= 4 ? 4 : 8) /* rows, rounded up */
#define TOKENS_AT_ONCE (LANES / SLOTS)  /* tokens whose scores fill one vector */
#define CHUNKS_AT_ONCE (LANES / SLOTS < CHUNKS ? LANES / SLOTS : CHUNKS)

#if defined(ELEMENT_IS_BFLOAT16) && defined(__AVX512BF16__) && HEAD_DIM % 32 == 0
/* The processor multiplies pairs of bfloat16 into float32 sums: half the work, nothing rounded. */
typedef uint16_t query_element;
typedef __m512bh key_part;
#define PART_DIM 32
INLINE key_part load_part(const element *p) { return (__m512bh)_mm512_loadu_si512(p); }
INLINE vector multiply_add(vector sum, const query_element *q, key_part key) {
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(q), key);
}
INLINE query_element query_of(float value) { /* it was a bfloat16 before */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (query_element)(bits >> 16);
}
#else
typedef float query_element;
typedef vector key_part;
#define PART_DIM LANES
INLINE key_part load_part(const element *p) { return load(p); }
INLINE vector multiply_add(vector sum, const query_element *q, key_part key) {
    return sum + get(q) * key;
}
INLINE query_element query_of(float value) { return value; }
#endif

/* Ask for a row of keys or values that the next phase will read. */
INLINE void prefetch(const stored *row) {
    UNROLL for (int byte = 0; byte < REST * (int)sizeof(stored); byte += 64)
        __builtin_prefetch((const char *)row + byte, 0, 2);
}

/* Scores of TOKENS_AT_ONCE keys, of which `now` are there: lane `token * SLOTS + row`. */
INLINE vector score_step(const query_element *query, const element *keys, int now, float scale) {
    vector dots[LANES];
    memset(dots, 0, sizeof dots);
    UNROLL for (int first = 0; first < HEAD_DIM; first += PART_DIM) {
        key_part key[TOKENS_AT_ONCE];
        UNROLL for (int t = 0; t < now; t++) key[t] = load_part(keys + t * HEAD_DIM + first);
        UNROLL for (int row = 0; row < ROWS; row++)
            UNROLL for (int t = 0; t < now; t++)
                dots[t * SLOTS + row] =
                    multiply_add(dots[t * SLOTS + row], query + row * HEAD_DIM + first, key[t]);
    }
    return sums(dots) * scale;
}

/* Scores `[BLOCK][SLOTS]` of up to BLOCK keys, while their values are fetched. */
static inline void score_block(const query_element *query, const element *keys, const stored *values,
                               int64_t count, float scale, float *scores) {
    int64_t first = 0;
    for (; first + TOKENS_AT_ONCE <= count; first += TOKENS_AT_ONCE) {
        UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++) prefetch(values + (first + t) * REST);
        vector sum = score_step(query, keys + first * HEAD_DIM, TOKENS_AT_ONCE, scale);
        put(scores + first * SLOTS, sum);
    }
    for (; first < count; first++) {
        vector sum = score_step(query, keys + first * HEAD_DIM, 1, scale);
        memcpy(scores + first * SLOTS, &sum, SLOTS * sizeof(float));
    }
    for (int64_t i = count * SLOTS; i < BLOCK * SLOTS; i++) scores[i] = -INFINITY;
}

/* Combine the lanes of each row, by `larger` or by adding; every lane gets its row's result. */
#define ACROSS(combine, s) \
    if (SLOTS <= (s)) FOLD(combine, s)
#if LANES == 16
#define ACROSS_ALL(combine) \
    ACROSS(combine, 8); ACROSS(combine, 4); ACROSS(combine, 2); ACROSS(combine, 1)
#else
#define ACROSS_ALL(combine) ACROSS(combine, 4); ACROSS(combine, 2); ACROSS(combine, 1)
#endif
INLINE vector largest_of_row(vector x) {
    ACROSS_ALL(larger);
    return x;
}
INLINE vector sum_of_row(vector x) {
    ACROSS_ALL(ADD);
    return x;
}

/*
 * Turn scores into powers of two over the highest so far; shrink what was summed under a lower one.
 * `highest` is the same in all lanes of a row; those of `total` are still to be added up.
 */
static inline void weigh_block(float *scores, float weights[ROWS][BLOCK], vector *highest,
                               vector *total, float sum[ROWS][HEAD_DIM]) {
    vector high = *highest;
    for (int first = 0; first < BLOCK * SLOTS; first += LANES)
        high = larger(get(scores + first), high);
    high = largest_of_row(high);
    if (memcmp(&high, highest, sizeof high)) {
        vector shrink = exp2_of(*highest - high);
        *total *= shrink;
        *highest = high;
        for (int row = 0; row < ROWS; row++)
            for (int d = 0; d < HEAD_DIM; d++) sum[row][d] *= shrink[row];
    }
    for (int first = 0; first < BLOCK * SLOTS; first += LANES) {
        vector weight = exp2_of(get(scores + first) - high);
        *total += weight;
        put(scores + first, weight);
    }
    /* One row after the other: each weight is then broadcast by the multiplication that uses it. */
    for (int row = 0; row < ROWS; row++)
        for (int t = 0; t < BLOCK; t++) weights[row][t] = scores[t * SLOTS + row];
}

/* Add the weighted values of a block to the sums, while the next block's keys are fetched. */
static inline void add_values(const element *values, const stored *next_keys, int64_t count,
                              int64_t next_count, float weights[ROWS][BLOCK],
                              float out[ROWS][HEAD_DIM]) {
    for (int chunk = 0; chunk < CHUNKS; chunk += CHUNKS_AT_ONCE) {
        vector sum[ROWS][CHUNKS_AT_ONCE];
        memset(sum, 0, sizeof sum);
        for (int64_t token = 0; token < count; token++) {
            if (chunk == 0 && token < next_count) prefetch(next_keys + token * REST);
            vector value[CHUNKS_AT_ONCE];
            UNROLL for (int c = 0; c < CHUNKS_AT_ONCE; c++)
                if (chunk + c < CHUNKS)
                    value[c] = load(values + token * HEAD_DIM + (chunk + c) * LANES);
            UNROLL for (int row = 0; row < ROWS; row++)
                UNROLL for (int c = 0; c < CHUNKS_AT_ONCE; c++)
                    if (chunk + c < CHUNKS) sum[row][c] += value[c] * weights[row][token];
        }
        UNROLL for (int row = 0; row < ROWS; row++)
            UNROLL for (int c = 0; c < CHUNKS_AT_ONCE; c++)
                if (chunk + c < CHUNKS) {
                    float *to = &out[row][(chunk + c) * LANES];
                    put(to, get(to) + sum[row][c]);
                }
    }
}

/* Attend ROWS queries to `count` keys from `first` on; out [ROWS][HEAD_DIM], lse [ROWS]. */
static void attend_part(const float *given_query, const stored *keys, const stored *values,
                        int64_t first, int64_t count, float scale, float *out, float *lse,
                        int64_t rows) {
    (void)rows; /* it is ROWS */
    element room[ROOM][HEAD_DIM] __attribute__((aligned(64)));
    float scores[BLOCK * SLOTS] __attribute__((aligned(64)));
    float weights[ROWS][BLOCK] __attribute__((aligned(64)));
    float sum[ROWS][HEAD_DIM] __attribute__((aligned(64)));
    query_element query[ROWS * HEAD_DIM] __attribute__((aligned(64)));
    vector highest = all(NOTHING), total = all(0);
    for (int i = 0; i < ROWS * HEAD_DIM; i++) query[i] = query_of(given_query[i]);
    memset(sum, 0, sizeof sum);
    scale *= LOG2_E;
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t now = count - start < BLOCK ? count - start : BLOCK;
        int64_t left = count - start - now, next = left < BLOCK ? left : BLOCK;
        int64_t at = first + start;
        const stored *these = values + at * ROW, *those = keys + (at + now) * ROW;
        const element *k = rows_of(keys, at, now, room, these);
        score_block(query, k, these + FETCHED, now, scale, scores);
        weigh_block(scores, weights, &highest, &total, sum);
        const element *v = rows_of(values, at, now, room, those);
        add_values(v, those + FETCHED, now, next, weights, sum);
    }
    total = sum_of_row(total);
    for (int row = 0; row < ROWS; row++) {
        lse[row] = (highest[row] + log2f(total[row])) * LN_2;
        for (int d = 0; d < HEAD_DIM; d++) out[row * HEAD_DIM + d] = sum[row][d] / total[row];
    }
}

#define TILES 0
#include "heads.h"
