/*
 * Values as a matrix unit multiplies weights by them: pairs of tokens, by dims. A pair are two tokens of
 * a page of 64 that are 32 apart, whose codes share a byte where the page is packed.
 *
 * A panel holds PANEL dims of the pairs of a block, in tiles of 16 columns. `place_of` a dim is its column,
 * counted through all tiles: any order serves, and that in which vectors interleave takes the least time.
 *
 * Whoever includes this has included `key_tiles.h`, and has vectors of 512 bits.
 */
#define PAGE 64           /* tokens */
#define APART (PAGE / 2)  /* tokens of a pair */
#define PAIRS (BLOCK / 2) /* of a block */
#define COLUMNS 16        /* of a tile */
typedef uint32_t panel[][PAIRS][COLUMNS];

/* Tokens of a block that are attended, counted from where it begins: from `first` to before `end`. */
struct range {
    int64_t first, end;
};
INLINE int has(struct range seen, int64_t token) { return seen.first <= token && token < seen.end; }
INLINE int has_page(struct range seen, int page) {
    return seen.first <= page * PAGE && (page + 1) * PAGE <= seen.end;
}

/* Two vectors of values interleaved: the lower or the upper half of each quarter. */
INLINE __m512i lower_pairs(__m512i early, __m512i late) { return _mm512_unpacklo_epi16(early, late); }
INLINE __m512i upper_pairs(__m512i early, __m512i late) { return _mm512_unpackhi_epi16(early, late); }

#if defined(PACKED) && !defined(INT8_PAGES) && !defined(FP8_PAGES) && HEAD_DIM % 64 == 0
#define UNPACKS_PAIRS 1 /* at once, and not values first */
#define PANEL 64
typedef stored packable;
INLINE int place_of(int dim) {
    return dim / 64 * 64 + dim % 16 / 4 * 16 + dim % 64 / 16 * 4 + dim % 4;
}

/* Set bits of one half of a pair, which are among those of `mask`. */
INLINE void put_half(panel to, int place, int64_t token, uint32_t mask, uint32_t bits) {
    uint32_t *pair = &to[place / COLUMNS][token / PAGE * APART + token % APART][place % COLUMNS];
    int shift = token % PAGE / APART * 16;
    *pair = (*pair & ~(mask << shift)) | bits << shift;
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
        PUT_BYTES(to[0][first + pair], lower_pairs(one, other));
        PUT_BYTES(to[1][first + pair], upper_pairs(one, other));
        one = DO(unpackhi_epi8)(low, high), other = DO(unpackhi_epi8)(lower, upper);
        PUT_BYTES(to[2][first + pair], lower_pairs(one, other));
        PUT_BYTES(to[3][first + pair], upper_pairs(one, other));
    }
}

/* Pack pairs of a page's values that are kept as they are, in the same order. */
INLINE void pack_raw_pairs(panel to, const element *values, int first) {
    const int even = 0x88, odd = 0xdd; /* quarters of vectors */
    for (int pair = first; pair < first + APART; pair++, values += HEAD_DIM) {
        const element *late = values + APART * HEAD_DIM;
        bytes one = GET_BYTES(values), other = GET_BYTES(late);
        bytes next = GET_BYTES(values + DIMS), after = GET_BYTES(late + DIMS);
        bytes low = lower_pairs(one, other), lower = lower_pairs(next, after);
        bytes high = upper_pairs(one, other), higher = upper_pairs(next, after);
        PUT_BYTES(to[0][pair], _mm512_shuffle_i64x2(low, lower, even));
        PUT_BYTES(to[1][pair], _mm512_shuffle_i64x2(high, higher, even));
        PUT_BYTES(to[2][pair], _mm512_shuffle_i64x2(low, lower, odd));
        PUT_BYTES(to[3][pair], _mm512_shuffle_i64x2(high, higher, odd));
    }
}

/*
 * Pack PANEL dims, from `dim` on, of the page at `index` of a block's. Tokens that are not attended become
 * zeros. Meanwhile lines from `ahead` on are fetched.
 */
INLINE void pack_page(panel to, const packable *values, int index, int dim, struct range seen,
                      const uint8_t *ahead) {
    const uint8_t *page = values + index * PAGE_BYTES;
    struct page_header header = header_of(page);
    if (header.overflowed) {
        pack_raw_pairs(to, raw_of(page) + dim, index * APART);
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
    if (has_page(seen, index)) return;
    for (int64_t token = index * PAGE; token < (index + 1) * PAGE; token++)
        if (!has(seen, token))
            for (int place = 0; place < PANEL; place++) put_half(to, place, token, 0xffff, 0);
}
#else
#define UNPACKS_PAIRS 0
#define PANEL DIMS
typedef element packable;
INLINE int place_of(int dim) {
    return dim / 32 * 32 + dim % 8 / 4 * 16 + dim % 32 / 8 * 4 + dim % 4;
}

/* Pack PANEL dims of a page, see above, of the values [BLOCK][HEAD_DIM] of a block. */
INLINE void pack_page(panel to, const packable *values, int index, int dim, struct range seen,
                      const uint8_t *ahead) {
    (void)ahead;
    int whole = has_page(seen, index);
    values += index * PAGE * HEAD_DIM + dim;
    for (int i = 0; i < APART; i++, values += HEAD_DIM) {
        int pair = index * APART + i, token = index * PAGE + i;
        __m512i early = {0}, late = {0}; /* what is not attended need not be there */
        if (whole || has(seen, token)) early = _mm512_loadu_si512(values);
        if (whole || has(seen, token + APART)) late = _mm512_loadu_si512(values + APART * HEAD_DIM);
        put(to[0][pair], (vector)lower_pairs(early, late));
        put(to[1][pair], (vector)upper_pairs(early, late));
    }
}
#endif

/*
 * Return the values of a block that begins `at` a token, as `pack_page` takes them, in `room` or where
 * they are. If they are unpacked, FETCHED of what lies at `ahead` is fetched meanwhile.
 */
INLINE const packable *packable_of(const stored *values, int64_t at, int64_t pages,
                                   element room[BLOCK][HEAD_DIM], const stored *ahead) {
#if UNPACKS_PAIRS
    (void)pages, (void)room, (void)ahead;
    return values + at / PAGE * PAGE_BYTES;
#else
    return rows_of(values, at, pages * PAGE, room, ahead);
#endif
}
