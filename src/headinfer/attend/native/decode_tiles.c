/*
 * Attention of a few query rows to many bfloat16 keys on the processor's matrix unit: `decode.c` where
 * there is one. Both products take keys and values as they lie in memory:
 *
 *   scores [16 tokens][16 rows]: keys [16 tokens][32 dims] x query [32 dims][16 rows], in pairs of dims;
 *   sums of values: a tile of values [16 tokens][32 dims] is read as pairs of dims of one token.
 *   Weights (w, 0) then select the even dims and (0, w) the odd ones, so that each query row takes
 *   two rows of a tile.
 *
 * Compiled for one HEAD_DIM (a multiple of 32) and ROWS (1 to 16) at a time.
 */
#include <math.h>

#include "elements.h"

#if !defined(__AMX_TILE__) || !defined(__AMX_BF16__)
int prepare(void) { return 0; }
#else
#include "tiles.h"

#define BLOCK 64 /* tokens of a block, which stays in the nearest caches */
#define STEP 16  /* tokens of a tile */
#define STEPS (BLOCK / STEP)
#define DIMS 32  /* of a tile */
#define CHUNKS (HEAD_DIM / DIMS)
#define PAIRS ((CHUNKS + 1) / 2)
#define HALVES_OF_ROWS (ROWS > 8 ? 2 : 1) /* eight query rows take the sixteen of a tile */
#define TILE_BYTES 64                     /* from row to row of a tile that is packed */

/* What one stretch of keys is attended in. */
struct state {
    uint32_t query[CHUNKS][16][16];             /* pairs of dims by rows */
    float scores[BLOCK][16];                    /* by rows */
    uint32_t weights[HALVES_OF_ROWS][STEPS][16][16]; /* (w, 0) and (0, w), by tokens */
    float sum[HALVES_OF_ROWS][CHUNKS][16][16];  /* even dims and odd ones, in turn */
    element tail[2][BLOCK][HEAD_DIM];           /* the last keys and values, with zeros behind */
    vector highest;                             /* by rows */
    vector total[ROWS];                         /* by tokens, to be added up at last */
} __attribute__((aligned(64)));

/*
 * Ask for one of `parts` equal parts of `count` keys or values. A core has few requests to memory in
 * flight: all at once would keep the next tile waiting, and none would be left to overlap with the
 * arithmetic, so each phase asks for a little all the time. (A core of a Xeon with AMX reads 13 GB/s
 * like this, 11 in two bursts a block, 9.5 by tiles alone, and 15 where it only reads.)
 */
INLINE void prefetch(const element *rows, int64_t count, int part, int parts) {
    const char *from = (const char *)(rows + count * part / parts * HEAD_DIM);
    const char *end = (const char *)(rows + count * (part + 1) / parts * HEAD_DIM);
    for (; from < end; from += 64) __builtin_prefetch(from, 0, 2);
}

/* Scores of BLOCK keys, while the values of the block are fetched. */
static void score_block(struct state *s, const element *keys, const element *values, float scale) {
    for (int first = 0; first < BLOCK; first += 2 * STEP) {
        const element *here = keys + first * HEAD_DIM, *below = here + STEP * HEAD_DIM;
        _tile_zero(0);
        _tile_zero(1);
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            prefetch(values, BLOCK, first / (2 * STEP) * CHUNKS + chunk, STEPS / 2 * CHUNKS);
            _tile_loadd(2, s->query[chunk], TILE_BYTES);
            _tile_loadd(3, here + chunk * DIMS, HEAD_DIM * 2);
            _tile_dpbf16ps(0, 3, 2);
            _tile_loadd(3, below + chunk * DIMS, HEAD_DIM * 2);
            _tile_dpbf16ps(1, 3, 2);
        }
        _tile_stored(0, s->scores[first], TILE_BYTES);
        _tile_stored(1, s->scores[first + STEP], TILE_BYTES);
    }
    for (int token = 0; token < BLOCK; token++)
        put(s->scores[token], get(s->scores[token]) * scale);
}

/*
 * Turn scores into weights, powers of two over the highest so far; shrink what was summed before.
 * Meanwhile the first of `ahead` keys of the next block are fetched.
 */
static void weigh_block(struct state *s, const element *next, int64_t ahead) {
    vector high = s->highest;
    for (int token = 0; token < BLOCK; token++) high = larger(get(s->scores[token]), high);
    if (memcmp(&high, &s->highest, sizeof high)) {
        vector shrink = exp2_of(s->highest - high);
        s->highest = high;
        for (int row = 0; row < ROWS; row++) {
            s->total[row] *= shrink[row];
            for (int chunk = 0; chunk < CHUNKS; chunk++)
                for (int odd = 0; odd < 2; odd++) {
                    float *to = s->sum[row / 8][chunk][row % 8 * 2 + odd];
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
            __m512i w = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)weight));
            uint32_t(*to)[16] = &s->weights[row / 8][step][row % 8 * 2];
            put(to[0], (vector)w);
            put(to[1], (vector)_mm512_slli_epi32(w, 16));
        }
    }
}

/* Add the weighted values of a block, while the rest of `ahead` keys of the next are fetched. */
static void add_values(struct state *s, const element *values, const element *next, int64_t ahead) {
    for (int half = 0; half < HALVES_OF_ROWS; half++)
        for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
            int both = chunk + 1 < CHUNKS;
            _tile_loadd(4, s->sum[half][chunk], TILE_BYTES);
            if (both) _tile_loadd(5, s->sum[half][chunk + 1], TILE_BYTES);
            for (int step = 0; step < STEPS; step++) {
                if (half == 0)
                    prefetch(next, ahead, STEPS * (1 + chunk / 2) + step, STEPS * (1 + PAIRS));
                const element *here = values + step * STEP * HEAD_DIM + chunk * DIMS;
                _tile_loadd(6, s->weights[half][step], TILE_BYTES);
                _tile_loadd(7, here, HEAD_DIM * 2);
                _tile_dpbf16ps(4, 6, 7);
                if (both) {
                    _tile_loadd(7, here + DIMS, HEAD_DIM * 2);
                    _tile_dpbf16ps(5, 6, 7);
                }
            }
            _tile_stored(4, s->sum[half][chunk], TILE_BYTES);
            if (both) _tile_stored(5, s->sum[half][chunk + 1], TILE_BYTES);
        }
}

/* Attend ROWS queries to `count` keys; out [ROWS][HEAD_DIM], lse [ROWS]. */
static void attend_part(const float *query, const element *keys, const element *values, int64_t count,
                        float scale, float *out, float *lse) {
    struct state s;
    memset(&s, 0, sizeof s);
    s.highest = all(NOTHING);
    for (int row = 0; row < ROWS; row++)
        for (int dim = 0; dim < HEAD_DIM; dim++) { /* it was a bfloat16 before */
            uint32_t bits;
            memcpy(&bits, query + row * HEAD_DIM + dim, sizeof bits);
            s.query[dim / DIMS][dim % DIMS / 2][row] |= bits >> 16 << (dim % 2 * 16);
        }
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t left = count - start, ahead = left - BLOCK < BLOCK ? left - BLOCK : BLOCK;
        if (ahead < 0) ahead = 0;
        const element *k = keys + start * HEAD_DIM, *v = values + start * HEAD_DIM;
        if (left < BLOCK) {
            memcpy(s.tail[0], k, left * HEAD_DIM * sizeof *k);
            memcpy(s.tail[1], v, left * HEAD_DIM * sizeof *v);
            k = s.tail[0][0], v = s.tail[1][0];
        }
        score_block(&s, k, v, scale * LOG2_E);
        for (int64_t token = left; token < BLOCK; token++) put(s.scores[token], all(NOTHING));
        weigh_block(&s, keys + (start + BLOCK) * HEAD_DIM, ahead);
        add_values(&s, v, keys + (start + BLOCK) * HEAD_DIM, ahead);
    }
    for (int row = 0; row < ROWS; row++) {
        float total = _mm512_reduce_add_ps((__m512)s.total[row]);
        lse[row] = (s.highest[row] + log2f(total)) * LN_2;
        for (int dim = 0; dim < HEAD_DIM; dim++) {
            float *sum = s.sum[row / 8][dim / DIMS][row % 8 * 2 + dim % 2];
            out[row * HEAD_DIM + dim] = sum[dim % DIMS / 2] / total;
        }
    }
}

/* As in `decode.c`. */
void attend_heads(const float *query, const element *keys, const element *values, int64_t key_stride,
                  int64_t value_stride, int64_t count, int64_t heads, int64_t splits, float scale,
                  float *out, float *lse, int threads) {
#pragma omp parallel num_threads(threads)
    {
        struct tile_config before;
        begin_tiles(&before);
        uint32_t mode = flush_tiny();
#pragma omp for schedule(static)
        for (int64_t part = 0; part < heads * splits; part++) {
            int64_t head = part / splits, split = part % splits;
            int64_t start = count * split / splits, end = count * (split + 1) / splits;
            attend_part(query + head * ROWS * HEAD_DIM, keys + head * key_stride + start * HEAD_DIM,
                        values + head * value_stride + start * HEAD_DIM, end - start, scale,
                        out + part * ROWS * HEAD_DIM, lse + part * ROWS);
        }
        restore(mode);
        end_tiles(&before);
    }
}
#endif
