/*
 * Pages in 8 bits a value: unpacking one. See headinfer/eight_bits/layout.py.
 *
 * By definition at compilation: HEAD_DIM, PAGE_BYTES, and INT8_PAGES or FP8_PAGES.
 */
#include "bytes.h"

#define PAGE_TOKENS 64
#define PAGE_VALUES (PAGE_TOKENS * HEAD_DIM)
#define HALF_PAGE (PAGE_VALUES / 2)
#define RAW_SCALE 0x7fc0

/* bfloat16 is the upper half of a float32. */
INLINE float scale_of(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

/* What a byte stands for. */
INLINE float number_of(uint8_t code) {
#ifdef INT8_PAGES
    return (int8_t)code;
#else
    /* 120 is between the biases of float32 and e4m3. Subnormal ones are differences: see flush_tiny. */
    uint32_t bits = (uint32_t)(code & 0x7f) << 20, small = bits < 1 << 23;
    bits += (120 + small) << 23;
    float number;
    memcpy(&number, &bits, sizeof number);
    number -= small ? 0x1p-6f : 0.0f;
    return code & 0x80 ? -number : number;
#endif
}

/* The element nearest to a finite number, as `rounded`, which knows NaN and so takes longer. */
INLINE element element_of(float number) {
#ifdef ELEMENT_IS_BFLOAT16
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return (element)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    return (element)number;
#endif
}

#if defined(FP8_PAGES) && !defined(ELEMENT_IS_FLOAT32) && defined(__AVX512VBMI__)
/*
 * Unpack a page by a table, for it has one scale: the lower and the upper bytes of what the codes stand
 * for, without their signs.
 */
INLINE void put_page(element *to, const uint8_t *page, const uint16_t *halves, const uint8_t *ahead) {
    uint8_t low[128], high[128];
    for (int code = 0; code < 128; code++) {
        element value = element_of(number_of((uint8_t)code) * scale_of(halves[0]));
        uint16_t bits;
        memcpy(&bits, &value, sizeof bits);
        low[code] = (uint8_t)bits, high[code] = (uint8_t)(bits >> 8);
    }
    bytes lows[] = {GET_BYTES(low), GET_BYTES(low + 64)}, sign = _mm512_set1_epi8((char)0x80);
    bytes highs[] = {GET_BYTES(high), GET_BYTES(high + 64)};
    for (int at = 0; at < PAGE_VALUES; at += AT_ONCE) {
        if (at % (2 * AT_ONCE) == 0) __builtin_prefetch(ahead + at / 2, 0, 2);
        bytes codes = spread(GET_BYTES(page + at));
        put_words((uint16_t *)to + at, _mm512_permutex2var_epi8(lows[0], codes, lows[1]),
                  EITHER(_mm512_permutex2var_epi8(highs[0], codes, highs[1]), BOTH(codes, sign)));
    }
}
#else
#if defined(INT8_PAGES) && defined(ELEMENT_IS_BFLOAT16) && defined(__AVX512BF16__) && HEAD_DIM % 32 == 0
/*
 * A token's elements. The processor rounds them, so that this takes less time than reading them; GCC's
 * own vectors took longer than the memory. Numbers too small for a normal bfloat16 become 0, as in all
 * of a thread that flushes them.
 */
INLINE __m512 scaled(const uint8_t *codes, const float *scales) {
    __m512i numbers = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes));
    return _mm512_cvtepi32_ps(numbers) * _mm512_loadu_ps(scales);
}
INLINE void put_token(element *to, const uint8_t *codes, const float *scales) {
    UNROLL for (int i = 0; i < HEAD_DIM; i += 32) {
        __m512 early = scaled(codes + i, scales + i), late = scaled(codes + i + 16, scales + i + 16);
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(late, early));
    }
}
#else
INLINE void put_token(element *to, const uint8_t *codes, const float *scales) {
    for (int i = 0; i < HEAD_DIM; i++) to[i] = element_of(number_of(codes[i]) * scales[i]);
}
#endif
INLINE void put_page(element *to, const uint8_t *page, const uint16_t *halves, const uint8_t *ahead) {
    float scales[HEAD_DIM];
    for (int i = 0; i < HEAD_DIM; i++) {
#ifdef INT8_PAGES
        scales[i] = scale_of(halves[i]);
#else
        scales[i] = scale_of(halves[0]);
#endif
    }
    for (int token = 0; token < PAGE_TOKENS; token++) {
        for (int byte = 0; byte < HEAD_DIM / 2; byte += 64)
            __builtin_prefetch(ahead + token * (HEAD_DIM / 2) + byte, 0, 2);
        put_token(to + token * HEAD_DIM, page + token * HEAD_DIM, scales);
    }
}
#endif

/*
 * Unpack a page into [PAGE_TOKENS][HEAD_DIM] elements. Meanwhile HALF_PAGE bytes from `ahead` on are
 * fetched, for memory would be idle; nothing needs to be there.
 */
static inline void unpack_page(const uint8_t *page, element *to, const uint8_t *ahead) {
    uint16_t halves[HEAD_DIM];
    memcpy(halves, page + PAGE_VALUES, PAGE_BYTES - PAGE_VALUES);
    if (halves[0] != RAW_SCALE) {
        put_page(to, page, halves, ahead);
        return;
    }
    uint64_t address;
    memcpy(&address, page, sizeof address);
    memcpy(to, (const void *)(uintptr_t)address, PAGE_VALUES * sizeof *to);
}
