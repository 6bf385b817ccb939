/*
 * Attention of a few query rows to many 16-bit keys on the processor's matrix unit: `decode.c` where
 * there is one. Both products take bfloat16 keys and values as they lie in memory:
 *
 *   scores [16 tokens][16 rows]: keys [16 tokens][32 dims] x query [32 dims][16 rows], in pairs of dims;
 *   sums of values: a tile of values [16 tokens][32 dims] is read as pairs of dims of one token.
 *   Weights (w, 0) then select the even dims and (0, w) the odd ones, so that each query row takes
 *   two rows of a tile.
 *
 * A float16 is the sum of two bfloat16, of its upper eight bits and of the other three: a block of
 * them is split into two planes first, and so are queries and weights. Products of two lower planes
 * of values and weights are left out: 2^-16 of the result at most, where a float16 weight has 2^-11.
 *
 * Compiled for one HEAD_DIM (a multiple of 32), ROWS (1 to 16) and element type at a time.
 */
#include <math.h>
#include <stddef.h>

#include "elements.h"

#if !defined(__AMX_TILE__) || !defined(__AMX_BF16__)
int prepare(void) { return 0; }
#else
#define BLOCK 64 /* tokens of a block, which stays in the nearest caches */
#include "key_tiles.h"
#define STEPS (BLOCK / STEP)
#define PANEL (2 * DIMS) /* dims that are taken at once */
#define PAIRS ((CHUNKS + 1) / 2)
#define HALVES_OF_ROWS (ROWS > 8 ? 2 : 1) /* eight query rows take the sixteen of a tile */
#ifdef ELEMENT_IS_FLOAT16
#define PLANES 2
#else
#define PLANES 1
#endif

/* What one stretch of keys is attended in. */
struct state {
    uint32_t query[PLANES][CHUNKS][16][16];     /* pairs of dims by rows */
    float scores[BLOCK][16];                    /* by rows */
    float more_scores[PLANES - 1][BLOCK][16];   /* to be added: a second sum shortens the chain */
    uint32_t weights[PLANES][HALVES_OF_ROWS][STEPS][16][16]; /* (w, 0) and (0, w), by tokens */
    float sum[PLANES][HALVES_OF_ROWS][CHUNKS][16][16]; /* even dims and odd ones, in turn */
    vector highest;                             /* by rows */
    vector total[ROWS];                         /* by tokens, to be added up at last */
    element room[ROOM][HEAD_DIM];               /* keys or values that are not as they are stored */
#if PLANES == 2
    uint16_t planes[PLANES * BLOCK][PANEL];     /* of the keys or values at hand */
#endif
} __attribute__((aligned(64)));

#if PLANES == 2
#define PITCH PANEL             /* elements from token to token of a panel */
#define PLANE (BLOCK * PANEL)   /* elements from plane to plane */
/* Which of DIMS is the even or odd one of a pair: not neighbours, which would take longer to pack. */
INLINE int dim_of(int pair, int odd) { return pair + odd * LANES; }

/* The upper halves of two vectors: of `one` in even places, of `other` in odd ones. */
INLINE vector upper_halves(bits32 one, bits32 other) {
    return (vector)(one >> 16 | (other & 0xffff0000));
}

/* Split a panel of float16 into planes of bfloat16, see `dim_of`; return the upper one. */
INLINE const uint16_t *panel_of(struct state *s, const element *from, int tokens, int dims) {
    for (int token = 0; token < tokens; token++)
        UNROLL for (int dim = 0; dim < dims; dim += DIMS) {
            const element *here = from + token * HEAD_DIM + dim;
            uint16_t *to = s->planes[token] + dim;
            vector one = load(here), other = load(here + LANES);
            vector rest = one - (vector)((bits32)one & 0xffff0000);
            vector other_rest = other - (vector)((bits32)other & 0xffff0000);
            put(to, upper_halves((bits32)one, (bits32)other));
            put(to + PLANE, upper_halves((bits32)rest, (bits32)other_rest));
        }
    STORED();
    return s->planes[0];
}
#else
#define PITCH HEAD_DIM
/* Which of DIMS is the even or odd one of a pair. */
INLINE int dim_of(int pair, int odd) { return pair * 2 + odd; }
INLINE const uint16_t *panel_of(struct state *s, const element *from, int tokens, int dims) {
    (void)s, (void)tokens, (void)dims;
    return from;
}
#endif

/*
 * Return BLOCK tokens from `first` on, in `room` or where they are; those from `count` on are zeros.
 */
INLINE const element *block_of(const stored *from, int64_t first, int64_t count,
                               element room[ROOM][HEAD_DIM], const stored *ahead) {
    const element *rows = rows_of(from, first, count < BLOCK ? count : BLOCK, room, ahead);
    if (count < BLOCK) {
#ifndef PACKED
        rows = memcpy(room[0], rows, count * sizeof *room);
#endif
        memset((element *)rows + count * HEAD_DIM, 0, (BLOCK - count) * sizeof *room);
    }
    STORED();
    return rows;
}

/*
 * Ask for one of `parts` equal parts of `count` keys or values. A core has few requests to memory in
 * flight: all at once would keep the next tile waiting, and none would be left to overlap with the
 * arithmetic, so each phase asks for a little all the time. (A core of a Xeon with AMX reads 13 GB/s
 * like this, 11 in two bursts a block, 9.5 by tiles alone, and 15 where it only reads.)
 */
INLINE void prefetch(const stored *rows, int64_t count, int part, int parts) {
    const char *from = (const char *)(rows + count * part / parts * REST);
    const char *end = (const char *)(rows + count * (part + 1) / parts * REST);
    for (; from < end; from += 64) __builtin_prefetch(from, 0, 2);
}

/* Scores of BLOCK keys, while the values of the block are fetched. */
static void score_block(struct state *s, const element *keys, const stored *values, float scale) {
    for (int first = 0; first < BLOCK; first += 2 * STEP) {
        _tile_zero(0);
        _tile_zero(1);
#if PLANES == 2
        _tile_zero(6);
        _tile_zero(7);
#endif
        for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
            int now = chunk + 1 < CHUNKS ? 2 : 1;
            const uint16_t *panel =
                panel_of(s, keys + first * HEAD_DIM + chunk * DIMS, 2 * STEP, now * DIMS);
            for (int c = 0; c < now; c++) {
                const uint16_t *here = panel + c * DIMS, *below = here + STEP * PITCH;
                prefetch(values, BLOCK, first / (2 * STEP) * CHUNKS + chunk + c, STEPS / 2 * CHUNKS);
                _tile_loadd(2, s->query[0][chunk + c], TILE_BYTES);
                _tile_loadd(3, here, PITCH * 2);
                _tile_dpbf16ps(0, 3, 2);
#if PLANES == 2
                _tile_loadd(4, s->query[1][chunk + c], TILE_BYTES);
                _tile_loadd(5, here + PLANE, PITCH * 2);
                _tile_dpbf16ps(6, 3, 4);
                _tile_dpbf16ps(0, 5, 4);
                _tile_dpbf16ps(6, 5, 2);
#endif
                _tile_loadd(3, below, PITCH * 2);
                _tile_dpbf16ps(1, 3, 2);
#if PLANES == 2
                _tile_loadd(5, below + PLANE, PITCH * 2);
                _tile_dpbf16ps(7, 3, 4);
                _tile_dpbf16ps(1, 5, 4);
                _tile_dpbf16ps(7, 5, 2);
#endif
            }
        }
        _tile_stored(0, s->scores[first], TILE_BYTES);
        _tile_stored(1, s->scores[first + STEP], TILE_BYTES);
#if PLANES == 2
        _tile_stored(6, s->more_scores[0][first], TILE_BYTES);
        _tile_stored(7, s->more_scores[0][first + STEP], TILE_BYTES);
#endif
    }
    for (int token = 0; token < BLOCK; token++) {
        vector score = get(s->scores[token]);
        for (int more = 0; more < PLANES - 1; more++) score += get(s->more_scores[more][token]);
        put(s->scores[token], score * scale);
    }
}

/* The bits of bfloat16 nearest to a vector. */
INLINE bits32 rounded_bits(vector x) {
    return (bits32)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
}

/* Put the weights of a row, as bits of bfloat16, where they select even dims, and odd ones. */
INLINE void put_weight(uint32_t weights[HALVES_OF_ROWS][STEPS][16][16], int step, int row, bits32 w) {
    uint32_t(*to)[16] = &weights[row / 8][step][row % 8 * 2];
    put(to[0], (vector)w);
    put(to[1], (vector)(w << 16));
}

/*
 * Turn scores into weights, powers of two over the highest so far; shrink what was summed before.
 * Meanwhile the first of `ahead` keys of the next block are fetched.
 */
static void weigh_block(struct state *s, const stored *next, int64_t ahead) {
    vector high = s->highest;
    for (int token = 0; token < BLOCK; token++) high = larger(get(s->scores[token]), high);
    if (memcmp(&high, &s->highest, sizeof high)) {
        vector shrink = exp2_of(s->highest - high);
        s->highest = high;
        for (int row = 0; row < ROWS; row++) {
            s->total[row] *= shrink[row];
            for (int i = 0; i < PLANES * CHUNKS * 2; i++) {
                float *to = s->sum[i / 2 / CHUNKS][row / 8][i / 2 % CHUNKS][row % 8 * 2 + i % 2];
                put(to, get(to) * shrink[row]);
            }
        }
    }
    for (int step = 0; step < STEPS; step++) {
        vector x[16];
        prefetch(next, ahead, step, STEPS * (1 + PAIRS));
        UNROLL for (int t = 0; t < STEP; t++) x[t] = get(s->scores[step * STEP + t]);
        transpose(x); /* first, because there are often fewer rows than 16 */
        UNROLL for (int row = 0; row < ROWS; row++) {
            vector weight = exp2_of(x[row] - high[row]);
            s->total[row] += weight;
#if PLANES == 2
            vector top = (vector)_mm512_and_si512((__m512i)weight, _mm512_set1_epi32(0xffff0000));
            put_weight(s->weights[0], step, row, (bits32)top >> 16);
            put_weight(s->weights[1], step, row, rounded_bits(weight - top));
#else
            put_weight(s->weights[0], step, row, rounded_bits(weight));
#endif
        }
    }
    STORED();
}

/* Add the weighted values of a block, while the rest of `ahead` keys of the next are fetched. */
static void add_values(struct state *s, const element *values, const stored *next, int64_t ahead) {
    for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
        int both = chunk + 1 < CHUNKS;
        const uint16_t *panel = panel_of(s, values + chunk * DIMS, BLOCK, both ? PANEL : DIMS);
        for (int half = 0; half < HALVES_OF_ROWS; half++) {
            _tile_loadd(4, s->sum[0][half][chunk], TILE_BYTES);
            if (both) _tile_loadd(5, s->sum[0][half][chunk + 1], TILE_BYTES);
#if PLANES == 2
            _tile_loadd(2, s->sum[1][half][chunk], TILE_BYTES);
            if (both) _tile_loadd(3, s->sum[1][half][chunk + 1], TILE_BYTES);
#endif
            for (int step = 0; step < STEPS; step++) {
                if (half == 0)
                    prefetch(next, ahead, STEPS * (1 + chunk / 2) + step, STEPS * (1 + PAIRS));
                const uint16_t *here = panel + step * STEP * PITCH;
                _tile_loadd(6, s->weights[0][half][step], TILE_BYTES);
                _tile_loadd(7, here, PITCH * 2);
                _tile_dpbf16ps(4, 6, 7);
#if PLANES == 2
                _tile_loadd(0, s->weights[1][half][step], TILE_BYTES);
                _tile_loadd(1, here + PLANE, PITCH * 2);
                _tile_dpbf16ps(2, 0, 7);
                _tile_dpbf16ps(2, 6, 1);
#endif
                if (both) {
                    _tile_loadd(7, here + DIMS, PITCH * 2);
                    _tile_dpbf16ps(5, 6, 7);
#if PLANES == 2
                    _tile_loadd(1, here + PLANE + DIMS, PITCH * 2);
                    _tile_dpbf16ps(3, 0, 7);
                    _tile_dpbf16ps(3, 6, 1);
#endif
                }
            }
            _tile_stored(4, s->sum[0][half][chunk], TILE_BYTES);
            if (both) _tile_stored(5, s->sum[0][half][chunk + 1], TILE_BYTES);
#if PLANES == 2
            _tile_stored(2, s->sum[1][half][chunk], TILE_BYTES);
            if (both) _tile_stored(3, s->sum[1][half][chunk + 1], TILE_BYTES);
#endif
        }
    }
}

/* Attend ROWS queries to `count` keys from `first` on; out [ROWS][HEAD_DIM], lse [ROWS]. */
static void attend_part(const float *query, const stored *keys, const stored *values, int64_t first,
                        int64_t count, float scale, float *out, float *lse, int64_t rows) {
    (void)rows; /* it is ROWS */
    struct state s;
    memset(&s, 0, offsetof(struct state, room)); /* the rest is written before it is read */
    s.highest = all(NOTHING);
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < HEAD_DIM; i++) {
            float rest = query[row * HEAD_DIM + i / DIMS * DIMS + dim_of(i % DIMS / 2, i % 2)];
            for (int plane = 0; plane < PLANES; plane++) { /* it was of 16 bits before */
                uint32_t bits;
                memcpy(&bits, &rest, sizeof bits);
                s.query[plane][i / DIMS][i % DIMS / 2][row] |= bits >> 16 << (i % 2 * 16);
                bits &= 0xffff0000;
                float top;
                memcpy(&top, &bits, sizeof top);
                rest -= top;
            }
        }
    STORED();
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t left = count - start, ahead = left - BLOCK < BLOCK ? left - BLOCK : BLOCK;
        if (ahead < 0) ahead = 0;
        int64_t at = first + start;
        const stored *these = values + at * ROW, *those = keys + (at + BLOCK) * ROW;
        const element *k = block_of(keys, at, left, s.room, these);
        score_block(&s, k, these + FETCHED, scale * LOG2_E);
        for (int64_t token = left; token < BLOCK; token++) put(s.scores[token], all(-INFINITY));
        weigh_block(&s, those + FETCHED, ahead);
        add_values(&s, block_of(values, at, left, s.room, those), those + FETCHED, ahead);
    }
    for (int row = 0; row < ROWS; row++) {
        float total = _mm512_reduce_add_ps((__m512)s.total[row]);
        lse[row] = (s.highest[row] + log2f(total)) * LN_2;
        for (int i = 0; i < HEAD_DIM; i++) {
            float sum = 0;
            for (int plane = 0; plane < PLANES; plane++)
                sum += s.sum[plane][row / 8][i / DIMS][row % 8 * 2 + i % 2][i % DIMS / 2];
            out[row * HEAD_DIM + i / DIMS * DIMS + dim_of(i % DIMS / 2, i % 2)] = sum / total;
        }
    }
}

#include "heads.h"
#endif
