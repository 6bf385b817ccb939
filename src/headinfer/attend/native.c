/*
 * Attention of a few query rows to many keys, with the log-sum-exp: the shape of a decode step.
 *
 * Such a step reads each key and value once and does little with it, so the aim is to read at the
 * speed of memory. Compiled for one head_dim, number of rows and element type at a time, by the
 * definitions HEAD_DIM (a multiple of LANES), ROWS (1 to 8) and ELEMENT_IS_FLOAT32,
 * ELEMENT_IS_BFLOAT16 or ELEMENT_IS_FLOAT16. Vectors are those of GCC and Clang, for any processor.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h> /* for what compilers do not make of vectors by themselves */
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float vector __attribute__((vector_size(LANES * 4)));
typedef uint32_t bits32 __attribute__((vector_size(LANES * 4)));

#if defined(ELEMENT_IS_FLOAT32)
typedef float element;
static inline vector load(const element *p) {
    vector v;
    memcpy(&v, p, sizeof v);
    return v;
}
#elif defined(ELEMENT_IS_BFLOAT16)
typedef uint16_t element;
typedef uint16_t bits16 __attribute__((vector_size(LANES * 2)));
static inline vector load(const element *p) { /* a bfloat16 is the upper half of a float32 */
    bits16 half;
    memcpy(&half, p, sizeof half);
    bits32 whole = __builtin_convertvector(half, bits32) << 16;
    vector v;
    memcpy(&v, &whole, sizeof v);
    return v;
}
#elif defined(ELEMENT_IS_FLOAT16)
typedef _Float16 element;
#if defined(__AVX512F__)
static inline vector load(const element *p) {
    return (vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
#elif defined(__F16C__)
static inline vector load(const element *p) {
    return (vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
#else
typedef _Float16 halves __attribute__((vector_size(LANES * 2)));
static inline vector load(const element *p) {
    halves half;
    memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, vector);
}
#endif
#endif

#define CHUNKS (HEAD_DIM / LANES)
#define UNROLL _Pragma("GCC unroll 16") /* arrays indexed by unrolled loops live in registers */
#define BLOCK 64                        /* tokens of a block, which stays in the nearest caches */
#define SLOTS (ROWS <= 1 ? 1 : ROWS <= 2 ? 2 : ROWS <= 4 ? 4 : 8) /* rows, rounded up */
#define TOKENS_AT_ONCE (LANES / SLOTS)  /* tokens whose scores fill one vector */
#define CHUNKS_AT_ONCE (LANES / SLOTS < CHUNKS ? LANES / SLOTS : CHUNKS)
#define NOTHING -1e30f                  /* a score whose exponential is 0 */

/* Lane j of the sum of halves: blocks of `s` lanes from a and b in turn, low halves or high. */
#define SOURCE(j, s, high) \
    (((j) / (2 * (s))) * 2 * (s) + ((j) % (s)) + ((high) ? (s) : 0) + \
     (((j) % (2 * (s))) >= (s) ? LANES : 0))
#if LANES == 16
#define MASK(s, h) \
    SOURCE(0, s, h), SOURCE(1, s, h), SOURCE(2, s, h), SOURCE(3, s, h), SOURCE(4, s, h), \
    SOURCE(5, s, h), SOURCE(6, s, h), SOURCE(7, s, h), SOURCE(8, s, h), SOURCE(9, s, h), \
    SOURCE(10, s, h), SOURCE(11, s, h), SOURCE(12, s, h), SOURCE(13, s, h), SOURCE(14, s, h), \
    SOURCE(15, s, h)
#else
#define MASK(s, h) \
    SOURCE(0, s, h), SOURCE(1, s, h), SOURCE(2, s, h), SOURCE(3, s, h), SOURCE(4, s, h), \
    SOURCE(5, s, h), SOURCE(6, s, h), SOURCE(7, s, h)
#endif
#ifdef __clang__
#define SHUFFLE(a, b, s, h) __builtin_shufflevector(a, b, MASK(s, h))
#else
typedef int32_t indices __attribute__((vector_size(LANES * 4)));
#define SHUFFLE(a, b, s, h) __builtin_shuffle(a, b, (indices){MASK(s, h)})
#endif
#define HALVE(s) \
    UNROLL for (int i = 0; i < (s); i++) x[i] = SHUFFLE(x[i], x[i + (s)], s, 0) + SHUFFLE(x[i], x[i + (s)], s, 1)

/* Return the sums over the lanes of LANES vectors; lane j is the sum of x[j]. */
static inline vector sums(vector x[LANES]) {
#if LANES == 16
    HALVE(8);
#endif
    HALVE(4);
    HALVE(2);
    HALVE(1);
    return x[0];
}

#if defined(ELEMENT_IS_BFLOAT16) && defined(__AVX512BF16__) && HEAD_DIM % 32 == 0
/* The processor multiplies pairs of bfloat16 into float32 sums: half the work, nothing rounded. */
typedef uint16_t query_element;
typedef __m512bh key_part;
#define PART_DIM 32
static inline key_part load_part(const element *p) { return (__m512bh)_mm512_loadu_si512(p); }
static inline vector multiply_add(vector sum, const query_element *q, key_part key) {
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(q), key);
}
static inline query_element query_of(float value) { /* it was a bfloat16 before */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (query_element)(bits >> 16);
}
#else
typedef float query_element;
typedef vector key_part;
#define PART_DIM LANES
static inline key_part load_part(const element *p) { return load(p); }
static inline vector multiply_add(vector sum, const query_element *q, key_part key) {
    vector v;
    memcpy(&v, q, sizeof v);
    return sum + v * key;
}
static inline query_element query_of(float value) { return value; }
#endif

/* Ask for a row of keys or values that the next phase will read. */
static inline void prefetch(const element *row) {
    UNROLL for (int byte = 0; byte < HEAD_DIM * (int)sizeof(element); byte += 64)
        __builtin_prefetch((const char *)row + byte, 0, 2);
}

/* Scores of TOKENS_AT_ONCE keys, of which `now` are there: lane `token * SLOTS + row`. */
static inline __attribute__((always_inline)) vector score_step(const query_element *query,
                                                               const element *keys, int now,
                                                               float scale) {
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
static inline void score_block(const query_element *query, const element *keys, const element *values,
                               int64_t count, float scale, float *scores) {
    int64_t first = 0;
    for (; first + TOKENS_AT_ONCE <= count; first += TOKENS_AT_ONCE) {
        UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++) prefetch(values + (first + t) * HEAD_DIM);
        vector sum = score_step(query, keys + first * HEAD_DIM, TOKENS_AT_ONCE, scale);
        memcpy(scores + first * SLOTS, &sum, sizeof sum);
    }
    for (; first < count; first++) {
        vector sum = score_step(query, keys + first * HEAD_DIM, 1, scale);
        memcpy(scores + first * SLOTS, &sum, SLOTS * sizeof(float));
    }
    for (int64_t i = count * SLOTS; i < BLOCK * SLOTS; i++) scores[i] = NOTHING;
}

/* Turn scores into exponentials over the highest so far; shrink what was summed under a lower one. */
static inline void weigh_block(float *scores, float weights[ROWS][BLOCK], float highest[SLOTS],
                               float total[SLOTS], float sum[ROWS][HEAD_DIM]) {
    float high[LANES], added[LANES], shift[SLOTS];
    for (int lane = 0; lane < LANES; lane++) high[lane] = highest[lane % SLOTS], added[lane] = 0;
    for (int first = 0; first < BLOCK * SLOTS; first += LANES)
        for (int lane = 0; lane < LANES; lane++)
            high[lane] = scores[first + lane] > high[lane] ? scores[first + lane] : high[lane];
    for (int slot = 0; slot < SLOTS; slot++) {
        float most = high[slot];
        for (int lane = slot; lane < LANES; lane += SLOTS) most = high[lane] > most ? high[lane] : most;
        shift[slot] = most;
        if (slot < ROWS && most > highest[slot]) {
            float shrink = expf(highest[slot] - most);
            total[slot] *= shrink;
            for (int d = 0; d < HEAD_DIM; d++) sum[slot][d] *= shrink;
        }
        highest[slot] = most;
    }
    for (int lane = 0; lane < LANES; lane++) high[lane] = shift[lane % SLOTS];
    for (int first = 0; first < BLOCK * SLOTS; first += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            scores[first + lane] = expf(scores[first + lane] - high[lane]);
            added[lane] += scores[first + lane];
        }
    for (int lane = 0; lane < LANES; lane++) total[lane % SLOTS] += added[lane];
    /* One row after the other: each weight is then broadcast by the multiplication that uses it. */
    for (int row = 0; row < ROWS; row++)
        for (int t = 0; t < BLOCK; t++) weights[row][t] = scores[t * SLOTS + row];
}

/* Add the weighted values of a block to the sums, while the next block's keys are fetched. */
static inline void add_values(const element *values, const element *next_keys, int64_t count,
                              int64_t next_count, float weights[ROWS][BLOCK],
                              float out[ROWS][HEAD_DIM]) {
    for (int chunk = 0; chunk < CHUNKS; chunk += CHUNKS_AT_ONCE) {
        vector sum[ROWS][CHUNKS_AT_ONCE];
        memset(sum, 0, sizeof sum);
        for (int64_t token = 0; token < count; token++) {
            if (chunk == 0 && token < next_count) prefetch(next_keys + token * HEAD_DIM);
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
                    vector before;
                    memcpy(&before, &out[row][(chunk + c) * LANES], sizeof before);
                    before += sum[row][c];
                    memcpy(&out[row][(chunk + c) * LANES], &before, sizeof before);
                }
    }
}

/* Attend ROWS queries to `count` keys; out [ROWS][HEAD_DIM], lse [ROWS]. */
static void attend_part(const float *given_query, const element *keys, const element *values,
                        int64_t count, float scale, float *out, float *lse) {
    float scores[BLOCK * SLOTS] __attribute__((aligned(64)));
    float weights[ROWS][BLOCK] __attribute__((aligned(64)));
    float sum[ROWS][HEAD_DIM] __attribute__((aligned(64)));
    float highest[SLOTS], total[SLOTS];
    query_element query[ROWS * HEAD_DIM] __attribute__((aligned(64)));
    for (int i = 0; i < ROWS * HEAD_DIM; i++) query[i] = query_of(given_query[i]);
    memset(sum, 0, sizeof sum);
    for (int slot = 0; slot < SLOTS; slot++) highest[slot] = NOTHING, total[slot] = 0;
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t now = count - start < BLOCK ? count - start : BLOCK;
        int64_t left = count - start - now, next = left < BLOCK ? left : BLOCK;
        score_block(query, keys + start * HEAD_DIM, values + start * HEAD_DIM, now, scale, scores);
        weigh_block(scores, weights, highest, total, sum);
        add_values(values + start * HEAD_DIM, keys + (start + now) * HEAD_DIM, now, next, weights,
                   sum);
    }
    for (int row = 0; row < ROWS; row++) {
        lse[row] = highest[row] + logf(total[row]);
        for (int d = 0; d < HEAD_DIM; d++) out[row * HEAD_DIM + d] = sum[row][d] / total[row];
    }
}

/*
 * Attend `heads` heads, each in `splits` stretches of its keys, on `threads` threads.
 * query [heads][ROWS][HEAD_DIM]; keys and values with `key_stride` and `value_stride` elements from
 * head to head; out [heads][splits][ROWS][HEAD_DIM], lse [heads][splits][ROWS].
 */
void attend_heads(const float *query, const element *keys, const element *values,
                  int64_t key_stride, int64_t value_stride, int64_t count, int64_t heads,
                  int64_t splits, float scale, float *out, float *lse, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < heads * splits; part++) {
        int64_t head = part / splits, split = part % splits;
        int64_t start = count * split / splits, end = count * (split + 1) / splits;
        attend_part(query + head * ROWS * HEAD_DIM, keys + head * key_stride + start * HEAD_DIM,
                    values + head * value_stride + start * HEAD_DIM, end - start, scale,
                    out + part * ROWS * HEAD_DIM, lse + part * ROWS);
    }
}
