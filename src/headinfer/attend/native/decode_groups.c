/*
 * Attention of many query rows to many bfloat16 keys on the processor's matrix unit: what verifies
 * drafted tokens, where `decode_tiles.c` has too few rows. Rows go in groups of 16, two at a time:
 *
 *   scores [16 tokens][16 rows]: keys [16 tokens][32 dims] x query [32 dims][16 rows], in pairs of dims;
 *   sums [16 rows][16 dims]: weights [16 rows][32 tokens] x values [32 tokens][16 dims], in pairs of
 *   tokens. Values are packed for it once for all rows, a panel at a time, which stays in the nearest
 *   cache.
 *
 * Compiled for one HEAD_DIM (a multiple of 32) and bfloat16, for any number of rows up to ROWS.
 */
#include <math.h>

#include "elements.h"

#if !defined(__AMX_TILE__) || !defined(__AMX_BF16__)
int prepare(void) { return 0; }
#else
#define TILES 1
#define ROWS_OF(rows) (rows)
#define BLOCK 128 /* tokens whose keys and values stay in the nearest caches */
#include "stored.h"
#define STEP 16   /* tokens of a tile of keys, rows of a group */
#define DIMS 32   /* of a tile of keys; tokens of a tile of weights */
#define CHUNKS (HEAD_DIM / DIMS)
#define GROUPS (ROWS / STEP)
#define TILE_BYTES 64 /* from row to row of a tile that is packed */

/* GCC does not know that tiles are loaded from memory: without this it may leave out what was stored. */
#define STORED() __asm__ volatile("" ::: "memory")

/* What one stretch of keys is attended in. */
struct state {
    uint32_t query[GROUPS][CHUNKS][16][16]; /* pairs of dims by rows */
    float scores[BLOCK][2 * STEP];          /* of two groups, by rows */
    uint16_t weights[GROUPS * STEP][BLOCK];
    uint32_t values[BLOCK / 2][DIMS];       /* pairs of tokens by dims, see `dim_of` */
    float sum[GROUPS][CHUNKS][2][16][16];   /* rows by dims, see `dim_of` */
    vector highest[GROUPS];                 /* by rows */
    vector total[GROUPS * STEP];            /* by tokens, to be added up at last */
    element room[ROOM][HEAD_DIM];           /* keys or values that are not as they are stored */
} __attribute__((aligned(64)));

/*
 * What is asked of memory while a block is attended: its values, then the next block's keys. A core
 * has few requests to memory in flight, so that each phase asks for a little all the time.
 */
struct ahead {
    const char *values, *keys; /* the first line that is not asked for */
    int64_t value_lines, key_lines, each;
};
INLINE void ask(struct ahead *a) {
    for (int64_t i = 0; i < a->each; i++) {
        if (a->value_lines) {
            __builtin_prefetch(a->values, 0, 2);
            a->values += 64, a->value_lines--;
        } else if (a->key_lines) {
            __builtin_prefetch(a->keys, 0, 2);
            a->keys += 64, a->key_lines--;
        }
    }
}

INLINE int64_t lines_of(int64_t tokens) { return tokens * REST * (int64_t)sizeof(stored) / 64; }

/* Times that two groups `ask` in a block: each takes about as long, but a step of weights twice. */
#define ASKED (BLOCK / DIMS * CHUNKS + 2 * 2 * BLOCK / STEP + CHUNKS * BLOCK / DIMS)

/* Scores of BLOCK keys for a group, and for the next one where there are `both`. */
static void score_block(struct state *s, const element *keys, int64_t group, int both, struct ahead *a) {
    for (int first = 0; first < BLOCK; first += 2 * STEP) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const element *here = keys + first * HEAD_DIM + chunk * DIMS;
            ask(a);
            _tile_loadd(4, here, HEAD_DIM * 2);
            _tile_loadd(5, here + STEP * HEAD_DIM, HEAD_DIM * 2);
            _tile_loadd(6, s->query[group][chunk], TILE_BYTES);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            if (both) {
                _tile_loadd(7, s->query[group + 1][chunk], TILE_BYTES);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, s->scores[first], 2 * TILE_BYTES);
        _tile_stored(1, s->scores[first] + STEP, 2 * TILE_BYTES);
        _tile_stored(2, s->scores[first + STEP], 2 * TILE_BYTES);
        _tile_stored(3, s->scores[first + STEP] + STEP, 2 * TILE_BYTES);
    }
}

/* Shrink what a group summed under a lower score than `high`. */
static void shrink_sums(struct state *s, int64_t group, vector high) {
    vector shrink = exp2_of(s->highest[group] - high);
    s->highest[group] = high;
    for (int row = 0; row < STEP; row++) {
        s->total[group * STEP + row] *= shrink[row];
        for (int i = 0; i < CHUNKS * 2; i++) {
            float *to = s->sum[group][i / 2][i % 2][row];
            put(to, get(to) * shrink[row]);
        }
    }
}

/* Turn a group's scores, `at` in each row, into weights: powers of two over the highest so far. */
static void weigh_block(struct state *s, int64_t group, int at, float scale, struct ahead *a) {
    vector high = s->highest[group];
    for (int token = 0; token < BLOCK; token++)
        high = larger(get(s->scores[token] + at) * scale, high);
    if (memcmp(&high, &s->highest[group], sizeof high)) shrink_sums(s, group, high);
    for (int first = 0; first < BLOCK; first += STEP) {
        vector x[16];
        ask(a);
        UNROLL for (int t = 0; t < STEP; t++) x[t] = get(s->scores[first + t] + at) * scale - high;
        transpose(x);
        ask(a);
        UNROLL for (int row = 0; row < STEP; row++) {
            vector weight = exp2_of(x[row]);
            s->total[group * STEP + row] += weight;
            _mm256_storeu_si256((__m256i *)&s->weights[group * STEP + row][first],
                                (__m256i)_mm512_cvtneps_pbh((__m512)weight));
        }
    }
    STORED();
}

/* Which of DIMS values is at a place of a packed row: halves of vectors are taken in turn. */
INLINE int dim_of(int place) { return place % 16 / 4 * 8 + place % 4 + place / 16 * 4; }

/* Pack DIMS of BLOCK values: pairs of tokens. */
INLINE void pack_values(struct state *s, const element *values) {
    for (int pair = 0; pair < BLOCK / 2; pair++, values += 2 * HEAD_DIM) {
        __m512i early = _mm512_loadu_si512(values), late = _mm512_loadu_si512(values + HEAD_DIM);
        put(s->values[pair], (vector)_mm512_unpacklo_epi16(early, late));
        put(s->values[pair] + LANES, (vector)_mm512_unpackhi_epi16(early, late));
    }
    STORED();
}

/* Add the weighted values of a block to the sums of all groups. */
static void add_values(struct state *s, const element *values, int64_t groups, struct ahead *a) {
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        pack_values(s, values + chunk * DIMS);
        for (int64_t group = 0; group < groups; group += 2) {
            int both = group + 1 < groups;
            float(*one)[16][16] = s->sum[group][chunk], (*other)[16][16] = s->sum[group + both][chunk];
            _tile_loadd(0, one[0], TILE_BYTES);
            _tile_loadd(1, one[1], TILE_BYTES);
            _tile_loadd(2, other[0], TILE_BYTES);
            _tile_loadd(3, other[1], TILE_BYTES);
            for (int first = 0; first < BLOCK; first += DIMS) {
                ask(a);
                _tile_loadd(4, &s->weights[group * STEP][first], BLOCK * 2);
                _tile_loadd(6, s->values[first / 2], DIMS * 4);
                _tile_loadd(7, s->values[first / 2] + LANES, DIMS * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (both) {
                    _tile_loadd(5, &s->weights[(group + 1) * STEP][first], BLOCK * 2);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, one[0], TILE_BYTES);
            _tile_stored(1, one[1], TILE_BYTES);
            if (both) {
                _tile_stored(2, other[0], TILE_BYTES);
                _tile_stored(3, other[1], TILE_BYTES);
            }
        }
    }
}

/* Begin with nothing attended; rows that fill the last group are zeros. */
static void begin(struct state *s, const float *query, int64_t rows, int64_t groups) {
    memset(s->query, 0, groups * sizeof *s->query);
    memset(s->sum, 0, groups * sizeof *s->sum);
    memset(s->total, 0, groups * STEP * sizeof *s->total);
    for (int64_t group = 0; group < groups; group++) s->highest[group] = all(NOTHING);
    for (int64_t row = 0; row < rows; row++)
        for (int dim = 0; dim < HEAD_DIM; dim++) {
            uint32_t bits; /* of a number that was a bfloat16 before */
            memcpy(&bits, query + row * HEAD_DIM + dim, sizeof bits);
            uint32_t *to = &s->query[row / STEP][dim / DIMS][dim % DIMS / 2][row % STEP];
            *to |= dim % 2 ? bits : bits >> 16;
        }
    STORED();
}

/* Attend queries to `count` keys from `first` on; out [rows][HEAD_DIM], lse [rows]. */
static void attend_part(const float *query, const stored *keys, const stored *values, int64_t first,
                        int64_t count, float scale, float *out, float *lse, int64_t rows) {
    int64_t groups = (rows + STEP - 1) / STEP, asked = (groups + 1) / 2 * ASKED;
    struct state s;
    begin(&s, query, rows, groups);
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t left = count - start, next = left - BLOCK < BLOCK ? left - BLOCK : BLOCK;
        int64_t at = first + start;
        const stored *these = values + at * ROW, *those = keys + (at + BLOCK) * ROW;
        struct ahead a = {.values = (const char *)(these + FETCHED),
                          .keys = (const char *)(those + FETCHED)};
        a.value_lines = lines_of(left < BLOCK ? left : BLOCK);
        a.key_lines = next > 0 ? lines_of(next) : 0;
        a.each = (a.value_lines + a.key_lines + asked - 1) / asked;
        const element *k = block_of(keys, at, left, s.room, these);
        for (int64_t group = 0; group < groups; group += 2) {
            score_block(&s, k, group, group + 1 < groups, &a);
            for (int64_t token = left; token < BLOCK; token++)
                for (int at = 0; at < 2 * STEP; at += STEP) put(s.scores[token] + at, all(-INFINITY));
            weigh_block(&s, group, 0, scale * LOG2_E, &a);
            if (group + 1 < groups) weigh_block(&s, group + 1, STEP, scale * LOG2_E, &a);
        }
        add_values(&s, block_of(values, at, left, s.room, those), groups, &a);
    }
    for (int64_t row = 0; row < rows; row++) {
        float total = _mm512_reduce_add_ps((__m512)s.total[row]);
        lse[row] = (s.highest[row / STEP][row % STEP] + log2f(total)) * LN_2;
        for (int i = 0; i < HEAD_DIM; i++)
            out[row * HEAD_DIM + i / DIMS * DIMS + dim_of(i % DIMS)] =
                s.sum[row / STEP][i / DIMS][i % DIMS / 16][row % STEP][i % 16] / total;
    }
}

#include "heads.h"
#endif
