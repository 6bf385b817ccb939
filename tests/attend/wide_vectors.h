/*
 * Vectors of 512 bits (AVX-512 F, BW, DQ and VBMI, and its bfloat16), done in plain C: included before a
 * kernel, so that what is written for processors that have them runs on any other. Only what kernels use.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#pragma GCC optimize("O1") /* compiling takes longer than running */

#define __AVX512F__ 1 /* behind the header, whose functions would take the processor for one */
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512BF16__ 1
#define __AVX512VBMI__ 1
#define WIDE static inline __attribute__((always_inline, unused))

typedef union {
    __m512i all;
    __m512 numbers;
    __m512bh halves;
    __m128i lanes[4];
    uint8_t bytes[64];
    uint16_t words[32];
    uint32_t bits[16];
    int32_t integers[16];
    uint64_t quarters[8];
    float floats[16];
} wide;
typedef uint16_t wide_mask;
#define OF(vector) ((wide){.all = (__m512i)(vector)})

/* Return a vector, as one `view`, of `count` parts of one kind; `i` counts them. */
#define MAKE(view, part, count, expression) \
    wide made; \
    for (int i = 0; i < (count); i++) made.part[i] = (expression); \
    return made.view
/* Define a function of two vectors, `a` and `b`. */
#define EACH(name, part, count, expression) \
    WIDE __m512i name(__m512i x, __m512i y) { \
        wide a = OF(x), b = OF(y); \
        MAKE(all, part, count, expression); \
    }

/* As the processor: small numbers are 0, and the even one of two is nearest. */
WIDE uint16_t wide_rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);
    if (!(bits & 0x7f800000)) bits &= 0x80000000;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
WIDE float wide_number(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    if (!(bits & 0x7f800000)) bits &= 0x80000000;
    memcpy(&value, &bits, sizeof value);
    return value;
}

WIDE __m512i wide_load(const void *from) {
    wide made;
    memcpy(&made, from, sizeof made);
    return made.all;
}
WIDE void wide_store(void *to, __m512i x) { memcpy(to, &x, sizeof x); }
WIDE __m512i wide_lanes(__m128i x) {
    MAKE(all, lanes, 4, x);
}
WIDE __m512i wide_byte(int x) {
    MAKE(all, bytes, 64, (uint8_t)x);
}
WIDE __m512i wide_integer(int x) {
    MAKE(all, integers, 16, x);
}
WIDE __m512i wide_of_bytes(__m128i x) {
    int8_t bytes[16];
    memcpy(bytes, &x, sizeof bytes);
    MAKE(all, integers, 16, bytes[i]);
}
WIDE __m512i wide_of_words(__m256i x) {
    uint16_t words[16];
    memcpy(words, &x, sizeof words);
    MAKE(all, bits, 16, words[i]);
}
WIDE __m512 wide_of_halves(__m256i x) {
    _Float16 halves[16];
    memcpy(halves, &x, sizeof halves);
    MAKE(numbers, floats, 16, (float)halves[i]);
}
WIDE __m512 wide_of_integers(__m512i x) {
    wide a = OF(x);
    MAKE(numbers, floats, 16, (float)a.integers[i]);
}
WIDE __m256bh wide_to_bfloat16(__m512 x) {
    wide a = OF(x);
    uint16_t halves[16];
    __m256bh made;
    for (int i = 0; i < 16; i++) halves[i] = wide_rounded(a.floats[i]);
    memcpy(&made, halves, sizeof made);
    return made;
}
WIDE __m512bh wide_both_to_bfloat16(__m512 late, __m512 early) {
    wide a = OF(early), b = OF(late);
    MAKE(halves, words, 32, wide_rounded(i < 16 ? a.floats[i] : b.floats[i - 16]));
}
/* The sum of `to` and of products of pairs of bfloat16, the later ones first. */
WIDE __m512 wide_pairs(__m512 to, __m512bh x, __m512bh y) {
    wide sum = OF(to), a = OF(x), b = OF(y);
    for (int odd = 1; odd >= 0; odd--)
        for (int i = 0; i < 16; i++)
            sum.floats[i] = fmaf(wide_number(a.words[2 * i + odd]),
                                 wide_number(b.words[2 * i + odd]), sum.floats[i]);
    return sum.numbers;
}
WIDE __m512 wide_above_floor(__m512 x) {
    wide a = OF(x);
    MAKE(numbers, floats, 16, isinf(a.floats[i]) ? 0 : a.floats[i] - floorf(a.floats[i]));
}
WIDE __m512 wide_scaled(__m512 x, __m512 by) {
    wide a = OF(x), b = OF(by);
    MAKE(numbers, floats, 16, a.floats[i] * exp2f(floorf(b.floats[i])));
}
WIDE float wide_sum(__m512 x) {
    wide a = OF(x);
    for (int apart = 8; apart; apart /= 2)
        for (int i = 0; i < apart; i++) a.floats[i] += a.floats[i + apart];
    return a.floats[0];
}
WIDE __m512i wide_words_shifted(__m512i x, int right) {
    wide a = OF(x);
    MAKE(all, words, 32, (uint16_t)(a.words[i] >> right));
}
WIDE wide_mask wide_greater(__m512 x, __m512 y) {
    wide a = OF(x), b = OF(y);
    wide_mask mask = 0;
    for (int i = 0; i < 16; i++) mask |= (wide_mask)((a.floats[i] > b.floats[i]) << i);
    return mask;
}
/* Two lanes of x and two of y, by numbers of two bits. */
WIDE __m512i wide_lanes_of(__m512i x, __m512i y, int numbers) {
    wide a = OF(x), b = OF(y);
    MAKE(all, lanes, 4, (i < 2 ? a : b).lanes[numbers >> 2 * i & 3]);
}
/* The 64 bytes of x and then those of y, by their numbers. */
WIDE __m512i wide_picked_bytes(__m512i x, __m512i numbers, __m512i y) {
    wide a = OF(x), b = OF(y), at = OF(numbers);
    MAKE(all, bytes, 64, (at.bytes[i] & 64 ? b : a).bytes[at.bytes[i] & 63]);
}
EACH(wide_larger, floats, 16, a.floats[i] > b.floats[i] ? a.floats[i] : b.floats[i])
EACH(wide_quarters, quarters, 8, b.quarters[a.quarters[i] & 7])
EACH(wide_looked_up, bytes, 64, b.bytes[i] & 128 ? 0 : a.bytes[i / 16 * 16 + b.bytes[i] % 16])
/* The lower or upper halves of lanes of 16 bytes, a part of x and one of y in turn. */
#define FROM_HALVES(kind, of_lane, upper) \
    (i % 2 ? b : a).kind[i / (of_lane) * (of_lane) + ((upper) ? (of_lane) / 2 : 0) + i % (of_lane) / 2]
EACH(wide_low_bytes, bytes, 64, FROM_HALVES(bytes, 16, 0))
EACH(wide_high_bytes, bytes, 64, FROM_HALVES(bytes, 16, 1))
EACH(wide_low_words, words, 32, FROM_HALVES(words, 8, 0))
EACH(wide_high_words, words, 32, FROM_HALVES(words, 8, 1))

#undef _mm512_cmp_ps_mask
#undef _mm512_reduce_ps
#undef _mm512_shuffle_i64x2
#define _mm512_loadu_si512(from) wide_load(from)
#define _mm512_loadu_ps(from) ((__m512)wide_load(from))
#define _mm512_storeu_si512(to, x) wide_store(to, x)
#define _mm512_broadcast_i32x4(x) wide_lanes(x)
#define _mm512_set1_epi8 wide_byte
#define _mm512_set1_epi32(x) wide_integer(x)
#define _mm512_setr_epi64(...) ((__m512i)(__v8di){__VA_ARGS__})
#define _mm512_and_si512(x, y) ((__m512i)((x) & (y)))
#define _mm512_or_si512(x, y) ((__m512i)((x) | (y)))
#define _mm512_andnot_si512(x, y) ((__m512i)(~(x) & (y)))
#define _mm512_cvtepi8_epi32(x) wide_of_bytes(x)
#define _mm512_cvtepu16_epi32(x) wide_of_words(x)
#define _mm512_cvtph_ps(x) wide_of_halves(x)
#define _mm512_cvtepi32_ps(x) wide_of_integers(x)
#define _mm512_cvtneps_pbh(x) wide_to_bfloat16(x)
#define _mm512_cvtne2ps_pbh(late, early) wide_both_to_bfloat16(late, early)
#define _mm512_dpbf16_ps(to, x, y) wide_pairs(to, x, y)
#define _mm512_reduce_add_ps(x) wide_sum(x)
#define _mm512_reduce_ps(x, downwards) wide_above_floor(x)
#define _mm512_scalef_ps(x, by) wide_scaled(x, by)
#define _mm512_srli_epi16 wide_words_shifted
#define _mm512_cmp_ps_mask(x, y, greater) wide_greater(x, y)
#define _mm512_max_ps(x, y) ((__m512)wide_larger((__m512i)(x), (__m512i)(y)))
#define _mm512_shuffle_i64x2(x, y, quarters) wide_lanes_of(x, y, quarters)
#define _mm512_permutex2var_epi8(x, numbers, y) wide_picked_bytes(x, numbers, y)
#define _mm512_permutexvar_epi64(numbers, x) wide_quarters(numbers, x)
#define _mm512_shuffle_epi8 wide_looked_up
#define _mm512_unpacklo_epi8 wide_low_bytes
#define _mm512_unpackhi_epi8 wide_high_bytes
#define _mm512_unpacklo_epi16(x, y) wide_low_words(x, y)
#define _mm512_unpackhi_epi16(x, y) wide_high_words(x, y)
