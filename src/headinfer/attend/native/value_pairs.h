/*
 * Values as a matrix unit multiplies weights by them: pairs of tokens, by dims. A pair are two tokens of
 * a page of 64 that are 32 apart, whose codes share a byte where the page is packed.
 *
 * A panel holds PANEL dims of the pairs of a block, in tiles of 16 columns. `place_of` a dim is its column
 * in all tiles: any order serves, and that in which vectors interleave takes the least time.
 *
 * Whoever includes this defines, besides HEAD_DIM, BLOCK: tokens of a block.
 */
#define PAGE 64           /* tokens */
#define APART (PAGE / 2)  /* tokens of a pair */
#define PAIRS (BLOCK / 2) /* of a block */
#define COLUMNS 16        /* of a tile */
typedef uint32_t panel[][PAIRS][COLUMNS];

/* Tokens of a block that are attended, counted from where it begins: from `first` to before `end`. */
struct window {
    int64_t first, end;
};
INLINE int sees(struct window w, int64_t token) { return w.first <= token && token < w.end; }

/* Whether all of a page is attended. */
INLINE int sees_page(struct window w, int page) {
    return w.first <= page * PAGE && (page + 1) * PAGE <= w.end;
}

/* Set bits of one half of a pair: those of `mask`. */
INLINE void put_half(panel to, int place, int64_t token, uint32_t mask, uint32_t bits) {
    uint32_t *pair = &to[place / COLUMNS][token / PAGE * APART + token % APART][place % COLUMNS];
    int shift = token % PAGE / APART * 16;
    *pair = (*pair & ~(mask << shift)) | bits << shift;
}

#if defined(CODES_AT) && defined(__AVX512BW__) && HEAD_DIM % 64 == 0
#define PANEL 64
typedef stored packable; /* pages are unpacked into pairs at once */
INLINE int place_of(int dim) {
    return dim / 64 * 64 + dim % 16 / 4 * 16 + dim % 64 / 16 * 4 + dim % 4;
}

/* Unpack pairs of a page's values, without its escapes. Meanwhile lines from `ahead` on are fetched. */
INLINE void unpack_pairs(panel to, const uint8_t *page, uint8_t base, int first,
                         const uint8_t *ahead) {
    struct tables t = tables_of(base);
    for (int pair = 0; pair < APART; pair++, page += HEAD_DIM) {
        __builtin_prefetch(ahead + pair * 64, 0, 2);
        bytes codes = GET_BYTES(page + CODES_AT), more = BOTH(DO(srli_epi16)(codes, 4), t.digits);
        bytes early = GET_BYTES(page), late = GET_BYTES(page + HALF_PAGE);
        codes = BOTH(codes, t.digits);
        bytes low = lows_of(early, codes, t), high = highs_of(early, codes, t);
        bytes lower = lows_of(late, more, t), upper = highs_of(late, more, t);
        bytes one = DO(unpacklo_epi8)(low, high), other = DO(unpacklo_epi8)(lower, upper);
        PUT_BYTES(to[0][first + pair], DO(unpacklo_epi16)(one, other));
        PUT_BYTES(to[1][first + pair], DO(unpackhi_epi16)(one, other));
        one = DO(unpackhi_epi8)(low, high), other = DO(unpackhi_epi8)(lower, upper);
        PUT_BYTES(to[2][first + pair], DO(unpacklo_epi16)(one, other));
        PUT_BYTES(to[3][first + pair], DO(unpackhi_epi16)(one, other));
    }
}

/*
 * Pack PANEL dims, from `dim` on, of the page at `index` of a block's. Tokens that are not attended become
 * zeros. Meanwhile lines from `ahead` on are fetched.
 */
INLINE void pack_page(panel to, const packable *values, int index, int dim, struct window w,
                      const uint8_t *ahead) {
    const uint8_t *page = values + index * PAGE_BYTES;
    struct page_header header = header_of(page);
    if (header.overflowed) {
        uint64_t address;
        memcpy(&address, page + PLACES_AT, sizeof address);
        const element *rows = (const element *)(uintptr_t)address + dim;
        for (int at = 0; at < PAGE * PANEL; at++)
            put_half(to, place_of(at % PANEL), index * PAGE + at / PANEL, 0xffff,
                     rows[at / PANEL * HEAD_DIM + at % PANEL]);
    } else {
        unpack_pairs(to, page + dim, header.base, index * APART, ahead);
        for (int i = 0; i < header.escapes; i++) {
            uint16_t place;
            memcpy(&place, page + PLACES_AT + 2 * i, sizeof place);
            int at = place % HEAD_DIM - dim;
            if (0 <= at && at < PANEL)
                put_half(to, place_of(at), index * PAGE + place / HEAD_DIM, 0x7f80,
                         (uint32_t)page[EXPONENTS_AT + i] << 7);
        }
    }
    if (sees_page(w, index)) return;
    for (int at = 0; at < PAGE * PANEL; at++)
        if (!sees(w, index * PAGE + at / PANEL))
            put_half(to, at % PANEL, index * PAGE + at / PANEL, 0xffff, 0);
}
#else
#define PANEL DIMS
typedef element packable;
INLINE int place_of(int dim) {
    return dim / 32 * 32 + dim % 8 / 4 * 16 + dim % 32 / 8 * 4 + dim % 4;
}

/* Pack PANEL dims of a page, see above, of the values [BLOCK][HEAD_DIM] of a block. */
INLINE void pack_page(panel to, const packable *values, int index, int dim, struct window w,
                      const uint8_t *ahead) {
    (void)ahead;
    values += index * PAGE * HEAD_DIM + dim;
    if (sees_page(w, index)) {
        for (int pair = index * APART; pair < (index + 1) * APART; pair++, values += HEAD_DIM) {
            __m512i early = _mm512_loadu_si512(values);
            __m512i late = _mm512_loadu_si512(values + APART * HEAD_DIM);
            put(to[0][pair], (vector)_mm512_unpacklo_epi16(early, late));
            put(to[1][pair], (vector)_mm512_unpackhi_epi16(early, late));
        }
        return;
    }
    for (int at = 0; at < PAGE * PANEL; at++) {
        int token = at / PANEL, seen = sees(w, index * PAGE + token);
        put_half(to, place_of(at % PANEL), index * PAGE + token, 0xffff,
                 seen ? values[token * HEAD_DIM + at % PANEL] : 0);
    }
}
#endif

/*
 * Return the values of a block that begins `at` a token, as `pack_page` takes them, in `room` or where
 * they are. If they are unpacked, FETCHED of what lies at `ahead` is fetched meanwhile.
 */
INLINE const packable *packable_of(const stored *values, int64_t at, int64_t pages,
                                   element room[BLOCK][HEAD_DIM], const stored *ahead) {
#ifndef PACKED
    (void)pages, (void)room, (void)ahead;
    return values + at * HEAD_DIM;
#else
    values += at / PAGE * PAGE_BYTES;
#if PANEL == 64
    (void)pages, (void)room, (void)ahead;
    return values;
#else
    for (int page = 0; page < pages; page++)
        unpack_page(values + page * PAGE_BYTES, room[page * PAGE], ahead + page * HALF_PAGE);
    return room[0];
#endif
#endif
}
