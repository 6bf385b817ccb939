/*
 * Matrix products of query rows with packed panels of keys or values, in vectors.
 *
 * A product goes in steps over its inner dimension. One step of one row is an `operand` of 4 bytes:
 * a float32 or, where the processor multiplies them, a pair of bfloat16. A panel holds VECTORS
 * vectors for each step. Whoever includes this defines, besides HEAD_DIM and the element type, BLOCK
 * (tokens packed at once), ROWS_AT_ONCE and VECTORS (whose product fits the registers), and TILES
 * where a matrix unit multiplies instead.
 */
#include "elements.h"
#include "stored.h"

#if defined(ELEMENT_IS_BFLOAT16) && defined(__AVX512BF16__) && HEAD_DIM % 32 == 0
#define PAIRS 1
typedef uint32_t operand; /* the earlier of the two in the lower half */
#else
#define PAIRS 0
typedef float operand;
#endif

#define PANEL (VECTORS * LANES) /* columns multiplied at once */
#define PER_STEP (1 + PAIRS)
#define DIM_STEPS (HEAD_DIM / PER_STEP)
#define BLOCK_STEPS (BLOCK / PER_STEP)

/* One vector of operands, from `PER_STEP * LANES` elements that follow each other. */
INLINE vector load_operands(const element *p) {
    return PAIRS ? get(p) : load(p);
}

/* Lay the keys of a panel out by step; those from `count` on are not there and become 0. */
INLINE void pack_keys(const element *keys, int64_t count, operand panel[DIM_STEPS][PANEL]) {
    for (int token = 0; token < PANEL; token += LANES)
        for (int step = 0; step < DIM_STEPS; step += LANES) {
            vector x[LANES];
            UNROLL for (int t = 0; t < LANES; t++)
                x[t] = token + t < count
                           ? load_operands(keys + (token + t) * HEAD_DIM + step * PER_STEP)
                           : all(0);
            transpose(x);
            UNROLL for (int s = 0; s < LANES; s++) put(&panel[step + s][token], x[s]);
        }
}

/* Lay a panel of dims of BLOCK values out by step; those from `count` on become 0. */
INLINE void pack_values(const element *values, int64_t count, operand panel[BLOCK_STEPS][PANEL]) {
    for (int step = 0; step < BLOCK_STEPS; step++)
        UNROLL for (int dim = 0; dim < PANEL; dim += LANES) {
            const element *from = values + step * PER_STEP * HEAD_DIM + dim;
            vector v = all(0);
#if PAIRS
            bits32 none = {0}, early = 2 * step < count ? widen(from) : none,
                   late = 2 * step + 1 < count ? widen(from + HEAD_DIM) : none;
            v = (vector)(early | late << 16);
#else
            if (step < count) v = load(from);
#endif
            put(&panel[step][dim], v);
        }
}

#if !TILES
INLINE vector multiply_add(vector sum, operand a, vector b) {
#if PAIRS
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    return sum + a * b;
#endif
}

/* A step's bytes of a panel as it is stored, and is not fetched otherwise. */
#define STEP_BYTES (PANEL * PER_STEP * REST * (int)sizeof(stored) / HEAD_DIM)

/*
 * c [ROWS_AT_ONCE][PANEL] = (add ? c : 0) + a [ROWS_AT_ONCE][steps] x b [steps][PANEL]
 * Meanwhile `fetched`, if any, is asked for: as many bytes as the panel takes as it is stored, a
 * little at each step, because a core has few requests to memory in flight.
 */
INLINE void multiply_panel(const operand *a, int64_t a_stride, const operand *b, int64_t steps,
                           float *c, int64_t c_stride, int add, const char *fetched) {
    vector sum[ROWS_AT_ONCE][VECTORS];
    memset(sum, 0, sizeof sum);
    if (add)
        UNROLL for (int row = 0; row < ROWS_AT_ONCE; row++)
            UNROLL for (int i = 0; i < VECTORS; i++)
                sum[row][i] = get(c + row * c_stride + i * LANES);
    for (int64_t step = 0; step < steps; step++) {
        vector columns[VECTORS];
        UNROLL for (int i = 0; i < VECTORS; i++) columns[i] = get(b + step * PANEL + i * LANES);
        if (fetched)
            UNROLL for (int byte = 0; byte < STEP_BYTES; byte += 64)
                __builtin_prefetch(fetched + step * STEP_BYTES + byte, 0, 2);
        UNROLL for (int row = 0; row < ROWS_AT_ONCE; row++) {
            operand one = a[row * a_stride + step];
            UNROLL for (int i = 0; i < VECTORS; i++)
                sum[row][i] = multiply_add(sum[row][i], one, columns[i]);
        }
    }
    UNROLL for (int row = 0; row < ROWS_AT_ONCE; row++)
        UNROLL for (int i = 0; i < VECTORS; i++) put(c + row * c_stride + i * LANES, sum[row][i]);
}
#endif

/*
 * Turn one row's scores into weights, powers of two over the highest so far.
 * Returns the factor by which what was summed under a lower one must shrink.
 */
INLINE float weigh(const float scores[BLOCK], operand weights[BLOCK_STEPS], float scale,
                   float *highest, float *total) {
    vector high = all(*highest), other = high, sum = all(0);
    for (int token = 0; token < BLOCK; token += 2 * LANES) {
        high = larger(get(scores + token) * scale, high);
        other = larger(get(scores + token + LANES) * scale, other);
    }
    float most = largest_lane(larger(high, other));
    for (int token = 0; token < BLOCK; token += 2 * LANES) {
        vector early = exp2_of(get(scores + token) * scale - most),
               late = exp2_of(get(scores + token + LANES) * scale - most);
        sum += early + late;
#if PAIRS
        put(weights + token / 2, (vector)_mm512_cvtne2ps_pbh((__m512)late, (__m512)early));
#else
        put(weights + token, early);
        put(weights + token + LANES, late);
#endif
    }
    float shrink = *highest == most ? 1 : exp2f(*highest - most);
    *total = *total * shrink + sum_of_lanes(sum);
    *highest = most;
    return shrink;
}
