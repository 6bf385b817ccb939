/*
 * Attention of a few query rows to many keys, with the log-sum-exp: the shape of a decode step.
 *
 * Such a step reads each key and value once and does little with it, so the aim is to read at the
 * speed of memory. Compiled for one head_dim, number of rows and element type at a time, by the
 * definitions HEAD_DIM (a multiple of LANES), ROWS (at most LANES) and ELEMENT_IS_FLOAT32,
 * ELEMENT_IS_BFLOAT16 or ELEMENT_IS_FLOAT16. Vectors are those of GCC and Clang, for any processor.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

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
typedef _Float16 halves __attribute__((vector_size(LANES * 2)));
static inline vector load(const element *p) {
    halves half;
    memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, vector);
}
#endif

#define CHUNKS (HEAD_DIM / LANES)
#define BLOCK 64                          /* keys and values of a block stay in the first-level cache */
#define TOKENS_AT_ONCE (LANES / ROWS)     /* dot products that fill one vector */
#define CHUNKS_AT_ONCE (LANES / ROWS < CHUNKS ? LANES / ROWS : CHUNKS) /* LANES registers hold sums */

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
    for (int i = 0; i < (s); i++) x[i] = SHUFFLE(x[i], x[i + (s)], s, 0) + SHUFFLE(x[i], x[i + (s)], s, 1)

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

/* scores[row][token] of `now` keys, at most TOKENS_AT_ONCE; inlined with a constant where it counts. */
static inline __attribute__((always_inline)) void score_step(const float *query,
                                                             const element *keys, int now,
                                                             float scale, int first,
                                                             float scores[ROWS][BLOCK]) {
    vector dots[LANES];
    memset(dots, 0, sizeof dots);
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        vector key[TOKENS_AT_ONCE];
        for (int t = 0; t < now; t++) key[t] = load(keys + t * HEAD_DIM + chunk * LANES);
        for (int row = 0; row < ROWS; row++) {
            vector q;
            memcpy(&q, query + row * HEAD_DIM + chunk * LANES, sizeof q);
            for (int t = 0; t < now; t++) dots[t * ROWS + row] += q * key[t];
        }
    }
    vector sum = sums(dots) * scale;
    for (int t = 0; t < now; t++)
        for (int row = 0; row < ROWS; row++) scores[row][first + t] = sum[t * ROWS + row];
}

static inline void score_block(const float *query, const element *keys, int count, float scale,
                               float scores[ROWS][BLOCK]) {
    int first = 0;
    for (; first + TOKENS_AT_ONCE <= count; first += TOKENS_AT_ONCE)
        score_step(query, keys + first * HEAD_DIM, TOKENS_AT_ONCE, scale, first, scores);
    for (; first < count; first++)
        score_step(query, keys + first * HEAD_DIM, 1, scale, first, scores);
}

static inline void add_values(const element *values, int count, float weights[ROWS][BLOCK],
                              float out[ROWS][HEAD_DIM]) {
    for (int chunk = 0; chunk < CHUNKS; chunk += CHUNKS_AT_ONCE) {
        vector sum[ROWS][CHUNKS_AT_ONCE];
        for (int row = 0; row < ROWS; row++)
            for (int c = 0; c < CHUNKS_AT_ONCE; c++)
                if (chunk + c < CHUNKS)
                    memcpy(&sum[row][c], &out[row][(chunk + c) * LANES], sizeof(vector));
        for (int token = 0; token < count; token++)
            for (int c = 0; c < CHUNKS_AT_ONCE; c++)
                if (chunk + c < CHUNKS) {
                    vector value = load(values + (int64_t)token * HEAD_DIM + (chunk + c) * LANES);
                    for (int row = 0; row < ROWS; row++) sum[row][c] += value * weights[row][token];
                }
        for (int row = 0; row < ROWS; row++)
            for (int c = 0; c < CHUNKS_AT_ONCE; c++)
                if (chunk + c < CHUNKS)
                    memcpy(&out[row][(chunk + c) * LANES], &sum[row][c], sizeof(vector));
    }
}

/* Attend ROWS queries to `count` keys; out [ROWS][HEAD_DIM], lse [ROWS]. */
static void attend_part(const float *query, const element *keys, const element *values,
                        int64_t count, float scale, float *out, float *lse) {
    float scores[ROWS][BLOCK], highest[ROWS], total[ROWS];
    float sum[ROWS][HEAD_DIM] __attribute__((aligned(64)));
    memset(sum, 0, sizeof sum);
    for (int row = 0; row < ROWS; row++) highest[row] = -INFINITY, total[row] = 0;
    for (int64_t start = 0; start < count; start += BLOCK) {
        int now = count - start < BLOCK ? (int)(count - start) : BLOCK;
        score_block(query, keys + start * HEAD_DIM, now, scale, scores);
        for (int row = 0; row < ROWS; row++) {
            float high = highest[row];
            for (int t = 0; t < now; t++) high = scores[row][t] > high ? scores[row][t] : high;
            if (high > highest[row]) {
                float shrink = expf(highest[row] - high);
                total[row] *= shrink;
                for (int d = 0; d < HEAD_DIM; d++) sum[row][d] *= shrink;
                highest[row] = high;
            }
            float added = 0;
            for (int t = 0; t < now; t++) {
                scores[row][t] = expf(scores[row][t] - high);
                added += scores[row][t];
            }
            total[row] += added;
        }
        add_values(values + start * HEAD_DIM, now, scores, sum);
    }
    for (int row = 0; row < ROWS; row++) {
        lse[row] = highest[row] + logf(total[row]);
        for (int d = 0; d < HEAD_DIM; d++) out[row * HEAD_DIM + d] = sum[row][d] / total[row];
    }
}

/*
 * Attend parts `first` to before `last` of `heads * splits`: part `head * splits + split` is that
 * head's queries and that stretch of its keys. query [heads][ROWS][HEAD_DIM]; keys and values with
 * `key_stride` and `value_stride` elements from head to head; out [heads][splits][ROWS][HEAD_DIM],
 * lse [heads][splits][ROWS].
 */
void attend_parts(const float *query, const element *keys, const element *values,
                  int64_t key_stride, int64_t value_stride, int64_t count, int64_t splits,
                  float scale, float *out, float *lse, int64_t first, int64_t last) {
    for (int64_t part = first; part < last; part++) {
        int64_t head = part / splits, split = part % splits;
        int64_t start = count * split / splits, end = count * (split + 1) / splits;
        attend_part(query + head * ROWS * HEAD_DIM, keys + head * key_stride + start * HEAD_DIM,
                    values + head * value_stride + start * HEAD_DIM, end - start, scale,
                    out + part * ROWS * HEAD_DIM, lse + part * ROWS);
    }
}
