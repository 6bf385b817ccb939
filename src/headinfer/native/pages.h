/*
 * Packed pages of bfloat16: their layout, and unpacking one. See headinfer/packed/layout.py.
 *
 * By definition at compilation: HEAD_DIM, PAGE_BYTES and MAX_ESCAPES.
 */
#include "bytes.h"

#define PAGE_TOKENS 64
#define PAGE_VALUES (PAGE_TOKENS * HEAD_DIM)
#define HALF_PAGE (PAGE_VALUES / 2)
#define CODES_AT PAGE_VALUES
#define HEADER_AT (PAGE_VALUES + HALF_PAGE)
#define PLACES_AT (HEADER_AT + 8)
#define EXPONENTS_AT (PLACES_AT + 2 * MAX_ESCAPES)
#define WINDOW 14
#define ESCAPE 15

struct page_header {
    uint16_t escapes;
    uint8_t base, overflowed, none[4];
};

INLINE struct page_header header_of(const uint8_t *page) {
    struct page_header header;
    memcpy(&header, page + HEADER_AT, sizeof header);
    return header;
}

/* The values of a page that has overflowed, as they are. */
INLINE const uint16_t *raw_of(const uint8_t *page) {
    uint64_t address;
    memcpy(&address, page + PLACES_AT, sizeof address);
    return (const uint16_t *)(uintptr_t)address;
}

#ifdef AT_ONCE
/* Exponents by their codes, as they go into the lower and the upper byte of a value. */
struct tables {
    bytes low, high, digits, mantissa;
};
INLINE struct tables tables_of(uint8_t base) {
    const __m128i codes = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m128i exponents = _mm_add_epi8(_mm_set1_epi8((char)base), codes);
    exponents = _mm_andnot_si128(_mm_cmpeq_epi8(codes, _mm_setzero_si128()), exponents);
    return (struct tables){
        TABLE(_mm_and_si128(_mm_slli_epi16(exponents, 7), _mm_set1_epi8((char)0x80))),
        TABLE(_mm_and_si128(_mm_srli_epi16(exponents, 1), _mm_set1_epi8(0x7f))),
        DO(set1_epi8)(0x0f),
        DO(set1_epi8)(0x7f),
    };
}

/* The lower and the upper bytes of values, from their signs and mantissas, and their codes. */
INLINE bytes lows_of(bytes rest, bytes codes, struct tables t) {
    return EITHER(BOTH(rest, t.mantissa), DO(shuffle_epi8)(t.low, codes));
}
INLINE bytes highs_of(bytes rest, bytes codes, struct tables t) {
    return EITHER(BUT_NOT(rest, t.mantissa), DO(shuffle_epi8)(t.high, codes));
}

/* Values from their signs and mantissas, and their codes, which are `spread`. */
INLINE void put_values(uint16_t *to, const uint8_t *kept, bytes codes, struct tables t) {
    bytes rest = spread(GET_BYTES(kept));
    put_words(to, lows_of(rest, codes, t), highs_of(rest, codes, t));
}
INLINE void unpack_codes(const uint8_t *page, uint8_t base, uint16_t *to, const uint8_t *ahead) {
    struct tables t = tables_of(base);
    for (int at = 0; at < HALF_PAGE; at += AT_ONCE) {
        __builtin_prefetch(ahead + at, 0, 2);
        bytes codes = spread(GET_BYTES(page + CODES_AT + at));
        put_values(to + at, page + at, BOTH(codes, t.digits), t);
        codes = BOTH(DO(srli_epi16)(codes, 4), t.digits);
        put_values(to + HALF_PAGE + at, page + HALF_PAGE + at, codes, t);
    }
}
#else
INLINE uint16_t value_of(uint8_t kept, uint16_t code, uint8_t base) {
    uint16_t exponent = (uint16_t)(code ? base + code : 0);
    return (uint16_t)((kept & 0x80) << 8 | (exponent << 7 & 0x7f80) | (kept & 0x7f));
}
INLINE void unpack_codes(const uint8_t *page, uint8_t base, uint16_t *to, const uint8_t *ahead) {
    for (int at = 0; at < HALF_PAGE; at++) {
        if (at % 64 == 0) __builtin_prefetch(ahead + at, 0, 2);
        uint8_t codes = page[CODES_AT + at];
        to[at] = value_of(page[at], codes & 15, base);
        to[HALF_PAGE + at] = value_of(page[HALF_PAGE + at], codes >> 4, base);
    }
}
#endif

/*
 * Unpack a page into [PAGE_TOKENS][HEAD_DIM] values, which may lie at any address. Meanwhile HALF_PAGE
 * bytes from `ahead` on are fetched, for memory would be idle; nothing needs to be there.
 */
static inline void unpack_page(const uint8_t *page, uint16_t *to, const uint8_t *ahead) {
    struct page_header header = header_of(page);
    if (header.overflowed) {
        memcpy(to, raw_of(page), PAGE_VALUES * sizeof *to);
        return;
    }
    unpack_codes(page, header.base, to, ahead);
    for (int i = 0; i < header.escapes; i++) {
        uint16_t place;
        memcpy(&place, page + PLACES_AT + 2 * i, sizeof place);
        to[place] = (uint16_t)((to[place] & 0x807f) | page[EXPONENTS_AT + i] << 7);
    }
}
