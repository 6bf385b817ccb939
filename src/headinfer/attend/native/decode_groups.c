/*
 * Attention of many query rows to many bfloat16 keys on the processor's matrix unit: what verifies
 * drafted tokens, where `decode_tiles.c` has too few rows. Rows go in groups of 16, two at a time:
 *
 *   scores [16 tokens][16 rows]: keys [16 tokens][32 dims] x query [32 dims][16 rows], in pairs of dims;
 *   sums [16 rows][16 dims]: weights [16 rows][32 tokens] x values [32 tokens][16 dims], in pairs of
 *   tokens. Values are packed for it once for all rows, a panel at a time, which stays in the nearest
 *   cache, see `value_pairs.h`.
 *
 * Blocks begin where pages do, so that packed ones give the same bits as others.
 *
 * Compiled for one HEAD_DIM (a multiple of 32) and bfloat16, for any number of rows up to ROWS.
 */
#include <math.h>

#include "elements.h"

#if !defined(__AMX_TILE__) || !defined(__AMX_BF16__)
int prepare(void) { return 0; }
#else
#define ROWS_OF(rows) (rows)
#define BLOCK 128 /* tokens whose weights are summed up at once */
#include "key_tiles.h"
#include "value_pairs.h"
#define GROUPS (ROWS / STEP)
#define SPAN (2 * STEP) /* tokens whose scores are taken at once, and stay in the nearest cache */
#define SLACK 8 /* weights are 2^SLACK at most */

/* What one stretch of keys is attended in. */
struct state {
    uint32_t query[GROUPS][CHUNKS][16][16]; /* pairs of dims by rows */
    float scores[SPAN][2 * STEP];           /* of two groups, by rows */
    uint16_t weights[GROUPS * STEP][BLOCK]; /* pairs of tokens */
    uint32_t values[PANEL / COLUMNS][PAIRS][COLUMNS];
    float sum[GROUPS][HEAD_DIM / COLUMNS][STEP][COLUMNS]; /* rows by dims, see `place_of` */
    vector highest[GROUPS], total[GROUPS];  /* by rows */
    element room[BLOCK][HEAD_DIM];          /* keys or values that are not as they are stored */
} __attribute__((aligned(64)));

/*
 * What is asked of memory while a block is attended: its values, then the next block's keys. A core
 * has few requests to memory in flight, so that each phase asks for a little all the time.
 */
struct ahead {
    const char *at, *end; /* the first line that is not asked for, and where these lines end */
    const char *keys;     /* what follows the end */
    int64_t each;         /* bytes that are asked for at once */
};
INLINE void ask(struct ahead *a) {
    if (a->at >= a->end) a->at = a->keys, a->keys = a->end = a->at + BLOCK * REST * sizeof(stored);
    for (int64_t byte = 0; byte < a->each; byte += 64) __builtin_prefetch(a->at + byte, 0, 2);
    a->at += a->each;
}

/* Times that two groups `ask` in a block: twice as often for weights, which take as much longer. */
#define ASKED (BLOCK / SPAN * (CHUNKS + 2 * 4) + BLOCK / DIMS * CHUNKS)

INLINE struct ahead ahead_of(const stored *values, const stored *keys, int64_t pairs) {
    int64_t bytes = BLOCK * REST * sizeof(stored), asked = pairs * ASKED * 64;
    const char *from = (const char *)values;
    return (struct ahead){from, from + bytes, (const char *)keys, (2 * bytes + asked - 1) / asked * 64};
}

/*
 * Scores of STEP keys and of those APART, for a group, and for the next one where there are `both`. Each
 * tile is loaded right before it is needed: a Xeon's core whose other thread is busy has one load of a
 * tile in flight (25 cycles), and products may run meanwhile.
 */
INLINE void score_span(struct state *s, const element *keys, int64_t group, int both, struct ahead *a) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        ask(a);
        _tile_loadd(4, keys + chunk * DIMS, HEAD_DIM * 2);
        _tile_loadd(6, s->query[group][chunk], TILE_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        if (both) {
            _tile_loadd(7, s->query[group + 1][chunk], TILE_BYTES);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_loadd(5, keys + chunk * DIMS + APART * HEAD_DIM, HEAD_DIM * 2);
        _tile_dpbf16ps(2, 5, 6);
        if (both) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, s->scores[0], 2 * TILE_BYTES);
    _tile_stored(2, s->scores[STEP], 2 * TILE_BYTES);
    if (both) {
        _tile_stored(1, s->scores[0] + STEP, 2 * TILE_BYTES);
        _tile_stored(3, s->scores[STEP] + STEP, 2 * TILE_BYTES);
    }
    STORED();
}

/* Shrink what a group summed under a lower score than `high`, and `first` weights not yet summed. */
static __attribute__((noinline)) void shrink_sums(struct state *s, int64_t group, vector high,
                                                  int first) {
    vector shrink = exp2_of(s->highest[group] - high);
    s->highest[group] = high;
    s->total[group] *= shrink;
    for (int row = 0; row < STEP; row++) {
        for (int tile = 0; tile < HEAD_DIM / COLUMNS; tile++) {
            float *to = s->sum[group][tile][row];
            put(to, get(to) * shrink[row]);
        }
        uint16_t *weights = s->weights[group * STEP + row];
        for (int token = 0; token < first; token++) {
            uint32_t bits = (uint32_t)weights[token] << 16;
            float weight;
            memcpy(&weight, &bits, sizeof weight);
            weights[token] = rounded(weight * shrink[row]);
        }
    }
}

/* Pairs of bfloat16 nearest to two vectors that are not negative; of two as near, the larger. */
INLINE vector pairs_of(vector early, vector late) {
    bits32 half = {0}, upper = (bits32)late + (half + 0x8000), lower = (bits32)early + (half + 0x8000);
    return (vector)((upper & 0xffff0000) | lower >> 16);
}

/*
 * Turn a group's scores of SPAN tokens, `at` in each row, into weights: powers of two over the highest
 * score, or one that is lower by SLACK at most. So what was summed must seldom shrink.
 */
INLINE void weigh_span(struct state *s, int64_t group, int at, int first, float scale, struct ahead *a) {
    vector most[4], total[2] = {s->total[group], all(0)}, pairs[16]; /* no chain of all */
    UNROLL for (int i = 0; i < 4; i++) most[i] = get(s->scores[i] + at);
    UNROLL for (int token = 4; token < SPAN; token += 4)
        UNROLL for (int i = 0; i < 4; i++) most[i] = larger(get(s->scores[token + i] + at), most[i]);
    vector high = larger(larger(most[0], most[1]), larger(most[2], most[3])) * scale;
    ask(a);
    if (_mm512_cmp_ps_mask((__m512)high, (__m512)(s->highest[group] + SLACK), _CMP_GT_OQ)) {
        shrink_sums(s, group, larger(high, s->highest[group]), first);
        total[0] = s->total[group];
    }
    high = s->highest[group];
    ask(a);
    UNROLL for (int pair = 0; pair < 16; pair++) {
        vector early = exp2_shortly(get(s->scores[pair] + at) * scale - high);
        vector late = exp2_shortly(get(s->scores[STEP + pair] + at) * scale - high);
        total[0] += early;
        total[1] += late;
        pairs[pair] = pairs_of(early, late);
        if (pair % 8 == 7) ask(a);
    }
    s->total[group] = total[0] + total[1];
    transpose(pairs);
    UNROLL for (int row = 0; row < STEP; row++) put(&s->weights[group * STEP + row][first], pairs[row]);
}

/* Return the keys of a page of a block that begins `at` a token, in `room` or where they are. */
INLINE const element *page_of(const stored *keys, int64_t at, int page, struct range seen,
                              element room[PAGE][HEAD_DIM], const stored *ahead) {
    const stored *part = ahead + page * PAGE * FETCHED / BLOCK;
    const element *rows = rows_of(keys, at + page * PAGE, PAGE, room, part);
#ifdef PACKED
    (void)seen;
#else
    if (has_page(seen, page)) return rows;
    for (int token = 0; token < PAGE; token++) /* the others need not be there */
        if (has(seen, page * PAGE + token))
            memcpy(room[token], rows + token * HEAD_DIM, sizeof *room);
    rows = room[0];
#endif
    STORED();
    return rows;
}

/* Which token of a page has the score `at` a place of a half of it, see `score_span`. */
INLINE int token_of(int half, int at) { return half * STEP + at / STEP * APART + at % STEP; }

/* Turn a page's keys into weights of a group, or of two. */
static void weigh_page(struct state *s, const element *keys, int page, struct range seen,
                       int64_t group, int both, float scale, struct ahead *a) {
    for (int half = 0; half < 2; half++) {
        int first = page * PAGE + half * SPAN;
        score_span(s, keys + half * STEP * HEAD_DIM, group, both, a);
        for (int at = 0; at < SPAN && !has_page(seen, page); at++)
            if (!has(seen, page * PAGE + token_of(half, at)))
                for (int i = 0; i < 2 * STEP; i += STEP) put(s->scores[at] + i, all(-INFINITY));
        weigh_span(s, group, 0, first, scale, a);
        if (both) weigh_span(s, group + 1, STEP, first, scale, a);
    }
}

/* Add the weighted values of `pages` to a chunk of the sums of a group, or of two. */
INLINE void add_chunk(struct state *s, int chunk, int64_t pages, int64_t group, int both,
                      struct ahead *a) {
    float(*one)[STEP][COLUMNS] = s->sum[group] + 2 * chunk;
    float(*other)[STEP][COLUMNS] = s->sum[group + both] + 2 * chunk;
    uint32_t(*values)[PAIRS][COLUMNS] = s->values + 2 * chunk % (PANEL / COLUMNS);
    _tile_loadd(0, one[0], TILE_BYTES);
    _tile_loadd(1, one[1], TILE_BYTES);
    _tile_loadd(2, other[0], TILE_BYTES);
    _tile_loadd(3, other[1], TILE_BYTES);
    for (int64_t pair = 0; pair < pages * APART; pair += STEP) {
        ask(a);
        _tile_loadd(4, &s->weights[group * STEP][2 * pair], BLOCK * 2);
        _tile_loadd(6, values[0][pair], TILE_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, values[1][pair], TILE_BYTES);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, &s->weights[(group + 1) * STEP][2 * pair], BLOCK * 2);
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

/* Add the weighted values of a block to the sums of all groups; each chunk begins where one ended. */
static void add_values(struct state *s, const packable *values, int64_t pages, struct range seen,
                       int64_t groups, const stored *ahead, struct ahead *a) {
    const uint8_t *next = (const uint8_t *)ahead;
    int64_t pairs = (groups + 1) / 2;
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        if (chunk * DIMS % PANEL == 0) {
            for (int page = 0; page < pages; page++, next += APART * 64)
                pack_page(s->values, values, page, chunk * DIMS, seen, next);
            STORED();
        }
        for (int64_t pair = 0; pair < pairs; pair++) {
            int64_t group = 2 * (chunk % 2 ? pairs - 1 - pair : pair);
            add_chunk(s, chunk, pages, group, group + 1 < groups, a);
        }
    }
}

/* Begin with nothing attended; rows that fill the last group are zeros. */
static void begin(struct state *s, const float *query, int64_t rows, int64_t groups) {
    memset(s->sum, 0, groups * sizeof *s->sum);
    for (int64_t group = 0; group < groups; group++) {
        s->highest[group] = all(NOTHING), s->total[group] = all(0);
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            vector x[16];
            UNROLL for (int i = 0; i < STEP; i++) {
                const float *from = query + (group * STEP + i) * HEAD_DIM + chunk * DIMS;
                x[i] = all(0);
                if (group * STEP + i < rows) /* bfloat16 before */
                    x[i] = (vector)_mm512_cvtne2ps_pbh((__m512)get(from + LANES), (__m512)get(from));
            }
            transpose(x);
            UNROLL for (int i = 0; i < 16; i++) put(s->query[group][chunk][i], x[i]);
        }
    }
    STORED();
}

/* Attend queries to `count` keys from `first` on, scale > 0; out [rows][HEAD_DIM], lse [rows]. */
static void attend_part(const float *query, const stored *keys, const stored *values, int64_t first,
                        int64_t count, float scale, float *out, float *lse, int64_t rows) {
    int64_t groups = (rows + STEP - 1) / STEP;
    struct state s;
    begin(&s, query, rows, groups);
    for (int64_t at = first / PAGE * PAGE, end = first + count; at < end && count; at += BLOCK) {
        struct range seen = {first - at, end - at};
        int64_t pages = end - at < BLOCK ? (end - at + PAGE - 1) / PAGE : BLOCK / PAGE;
        const stored *these = values + at * ROW, *those = keys + (at + BLOCK) * ROW;
        struct ahead a = ahead_of(these + FETCHED, those + FETCHED, (groups + 1) / 2);
        for (int page = 0; page < pages; page++) {
            const element *k = page_of(keys, at, page, seen, s.room, these);
            for (int64_t group = 0; group < groups; group += 2)
                weigh_page(&s, k, page, seen, group, group + 1 < groups, scale * LOG2_E, &a);
        }
        add_values(&s, packable_of(values, at, pages, s.room, those), pages, seen, groups, those, &a);
    }
    for (int64_t row = 0; row < rows; row++) {
        int group = row / STEP, lane = row % STEP;
        float total = s.total[group][lane];
        lse[row] = (s.highest[group][lane] + log2f(total)) * LN_2;
        for (int dim = 0; dim < HEAD_DIM; dim += 4) { /* which lie together */
            const float *four = s.sum[group][place_of(dim) / COLUMNS][lane] + place_of(dim) % COLUMNS;
            __m128 mean = _mm_div_ps(_mm_load_ps(four), _mm_set1_ps(total));
            _mm_storeu_ps(out + row * HEAD_DIM + dim, mean);
        }
    }
}

#include "heads.h"
_Static_assert(PAGE == PART_TOKENS, "no page is in two stretches");
#endif
