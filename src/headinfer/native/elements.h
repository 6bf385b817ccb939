/*
 * Vectors of float32, and how elements of other types become them.
 *
 * Vectors are those of GCC and Clang, for any processor. The element type is ELEMENT_IS_FLOAT32,
 * ELEMENT_IS_BFLOAT16 or ELEMENT_IS_FLOAT16, by definition at compilation.
 */
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
#define UNROLL _Pragma("GCC unroll 16") /* arrays indexed by unrolled loops live in registers */
#define INLINE static inline __attribute__((always_inline))
#define NOTHING -1e30f /* a score whose exponential is 0 */

typedef float vector __attribute__((vector_size(LANES * 4)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
typedef uint32_t bits32 __attribute__((vector_size(LANES * 4)));

/*
 * Let numbers below 2^-126 be 0, in this thread and until `restore`: some processors take a hundred
 * times as long for them, and a sum of float32 that has them has nothing to say.
 */
INLINE uint32_t flush_tiny(void) {
#ifdef __x86_64__
    uint32_t before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#else
    return 0;
#endif
}
INLINE void restore(uint32_t before) {
#ifdef __x86_64__
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

/* A vector from any address, or to it. Not memcpy: GCC copies in halves, which then stalls. */
typedef vector anywhere __attribute__((aligned(1), may_alias));
INLINE vector get(const void *p) { return *(const anywhere *)p; }
INLINE void put(void *p, vector v) { *(anywhere *)p = v; }

#if defined(ELEMENT_IS_FLOAT32)
typedef float element;
INLINE vector load(const element *p) { return get(p); }
#elif defined(ELEMENT_IS_BFLOAT16)
typedef uint16_t element;
INLINE bits32 widen(const element *p) {
#if defined(__AVX512F__) /* GCC would convert in halves */
    return (bits32)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#else
    typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(1), may_alias));
    return __builtin_convertvector(*(const halves *)p, bits32);
#endif
}
INLINE vector load(const element *p) { /* a bfloat16 is the upper half of a float32 */
    return (vector)(widen(p) << 16);
}
#elif defined(ELEMENT_IS_FLOAT16)
typedef _Float16 element;
INLINE vector load(const element *p) {
#if defined(__AVX512F__)
    return (vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vector v;
    for (int lane = 0; lane < LANES; lane++) v[lane] = p[lane];
    return v;
#endif
}
#endif

/* The element nearest to a number, the even one of two. */
INLINE element rounded(float value) {
#if defined(ELEMENT_IS_BFLOAT16)
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (element)(value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    return (element)value;
#endif
}

INLINE vector all(float value) { return value - (vector){0}; }

/* The larger in each lane; where either is NaN, that of b. */
INLINE vector larger(vector a, vector b) {
#if defined(__AVX512F__)
    return (vector)_mm512_max_ps((__m512)a, (__m512)b);
#else
    integers first = a > b;
    return (vector)(((integers)a & first) | ((integers)b & ~first));
#endif
}

#define LOG2_E 1.44269504f
#define LN_2 0.693147181f

/*
 * 2 to the power of x <= 0, relative error 3e-7; 0 below 2^-64, which a sum with 1 in it never shows.
 * Were they not 0, their products with values would be so small that processors stumble over them.
 */
INLINE vector exp2_of(vector x) {
    vector rounded = x + 12582912.0f; /* 1.5 * 2^23: the whole number is in the lowest bits */
    vector f = x - (rounded - 12582912.0f);
    vector p = f * 1.327647203e-3f + 9.675541480e-3f; /* minimax on -0.5 to 0.5 */
    p = p * f + 5.550713275e-2f;
    p = p * f + 2.402211972e-1f;
    p = p * f + 6.931469671e-1f;
    p = p * f + 1.0f;
    return (vector)(((bits32)p + ((bits32)rounded << 23)) & ~(bits32)(x < -64.0f)); /* keeps NaN */
}

#if defined(__AVX512F__) && defined(__AVX512DQ__)
/*
 * 2 to the power of x, relative error 3e-6: for what is rounded to a bfloat16 next, which has 4e-3. x up
 * to 100, of -inf and what is too small it is 0; NaN stays. The processor takes numbers apart, and puts
 * them together.
 */
INLINE vector exp2_shortly(vector x) {
    vector f = (vector)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vector p = f * 1.353416792e-2f + 5.201146061e-2f; /* minimax on 0 to 1 */
    p = p * f + 2.414427569e-1f;
    p = p * f + 6.930038345e-1f;
    p = p * f + 1.000002593f;
    return (vector)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#endif

/* The lower or upper halves of a and b: blocks of `s` lanes from each in turn. */
#define SOURCE(j, s, upper) \
    (((j) / (2 * (s))) * 2 * (s) + ((j) % (s)) + ((upper) ? (s) : 0) + \
     (((j) % (2 * (s))) >= (s) ? LANES : 0))
#if LANES == 16
#define SOURCES(s, u) \
    SOURCE(0, s, u), SOURCE(1, s, u), SOURCE(2, s, u), SOURCE(3, s, u), SOURCE(4, s, u), \
    SOURCE(5, s, u), SOURCE(6, s, u), SOURCE(7, s, u), SOURCE(8, s, u), SOURCE(9, s, u), \
    SOURCE(10, s, u), SOURCE(11, s, u), SOURCE(12, s, u), SOURCE(13, s, u), SOURCE(14, s, u), \
    SOURCE(15, s, u)
#else
#define SOURCES(s, u) \
    SOURCE(0, s, u), SOURCE(1, s, u), SOURCE(2, s, u), SOURCE(3, s, u), SOURCE(4, s, u), \
    SOURCE(5, s, u), SOURCE(6, s, u), SOURCE(7, s, u)
#endif
#ifdef __clang__
#define HALVES(a, b, s, u) __builtin_shufflevector(a, b, SOURCES(s, u))
#else
#define HALVES(a, b, s, u) __builtin_shuffle(a, b, (integers){SOURCES(s, u)})
#endif

/* All lanes combined with those `s` away from them. */
#define FOLD(combine, s) x = combine(HALVES(x, x, s, 0), HALVES(x, x, s, 1))
#if LANES == 16
#define FOLD_ALL(combine) FOLD(combine, 8); FOLD(combine, 4); FOLD(combine, 2); FOLD(combine, 1)
#else
#define FOLD_ALL(combine) FOLD(combine, 4); FOLD(combine, 2); FOLD(combine, 1)
#endif
#define ADD(a, b) ((a) + (b))
INLINE float largest_lane(vector x) {
    FOLD_ALL(larger);
    return x[0];
}
INLINE float sum_of_lanes(vector x) {
    FOLD_ALL(ADD);
    return x[0];
}

#define HALVE(s) \
    UNROLL for (int i = 0; i < (s); i++) \
        x[i] = HALVES(x[i], x[i + (s)], s, 0) + HALVES(x[i], x[i + (s)], s, 1)

/* Return the sums over the lanes of LANES vectors; lane j is the sum of x[j]. */
INLINE vector sums(vector x[LANES]) {
#if LANES == 16
    HALVE(8);
#endif
    HALVE(4);
    HALVE(2);
    HALVE(1);
    return x[0];
}

#define EXCHANGE(s) \
    UNROLL for (int i = 0; i < LANES; i++) \
        if (!(i & (s))) { \
            vector low = HALVES(x[i], x[i + (s)], s, 0), high = HALVES(x[i], x[i + (s)], s, 1); \
            x[i] = low, x[i + (s)] = high; \
        }

/* Make rows of what were columns. */
INLINE void transpose(vector x[LANES]) {
#if LANES == 16
    EXCHANGE(8)
#endif
    EXCHANGE(4)
    EXCHANGE(2)
    EXCHANGE(1)
}
