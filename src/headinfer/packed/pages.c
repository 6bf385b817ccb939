/*
 * Packing and unpacking of many pages, by as many threads as the caller says. See layout.py.
 *
 * Compiled for one HEAD_DIM, and for PAGE_BYTES and MAX_ESCAPES that belong to it.
 */
#include "elements.h"
#include "pages.h"

/* The base that leaves the fewest escapes, the lowest of several. */
static int base_of(const uint16_t *values) {
    uint32_t counts[4][256], inside = 0, most;
    memset(counts, 0, sizeof counts);
    for (int i = 0; i < PAGE_VALUES; i += 4) /* four counts: one alone waits for itself */
        UNROLL for (int j = 0; j < 4; j++) counts[j][values[i + j] >> 7 & 0xff]++;
    for (int i = 0; i < 256; i++) counts[0][i] += counts[1][i] + counts[2][i] + counts[3][i];
    int best = 0;
    for (int exponent = 1; exponent <= WINDOW; exponent++) inside += counts[0][exponent];
    most = inside;
    for (int base = 1; base + WINDOW < 256; base++) {
        inside += counts[0][base + WINDOW] - counts[0][base];
        if (inside > most) most = inside, best = base;
    }
    return best;
}

INLINE uint8_t code_of(uint16_t value, int base) {
    uint16_t exponent = value >> 7 & 0xff, code = (uint16_t)(exponent - base);
    code = (uint16_t)(code - 1) < WINDOW ? code : ESCAPE;
    return (uint8_t)(exponent ? code : 0);
}

/* Whether any of 16 codes is an escape. */
INLINE int has_escape(const uint8_t *codes) {
    uint64_t x;
    memcpy(&x, codes, sizeof x);
    x &= x >> 1;
    return (x & x >> 2 & 0x1111111111111111) != 0;
}

/* List the escapes of a page whose codes are there; return how many, or more than there is room for. */
static int list_escapes(const uint16_t *values, uint8_t *page) {
    int listed = 0;
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < HALF_PAGE; i++) {
            if (i % 8 == 0 && !has_escape(page + CODES_AT + i)) {
                i += 7;
                continue;
            }
            if ((page[CODES_AT + i] >> 4 * half & 15) != ESCAPE) continue;
            uint16_t place = (uint16_t)(half * HALF_PAGE + i);
            if (listed == MAX_ESCAPES) return MAX_ESCAPES + 1;
            memcpy(page + PLACES_AT + 2 * listed, &place, sizeof place);
            page[EXPONENTS_AT + listed++] = (uint8_t)(values[place] >> 7);
        }
    return listed;
}

/* Pack [PAGE_TOKENS][HEAD_DIM] values. */
static void pack_page(const uint16_t *values, uint8_t *page) {
    struct page_header header = {.base = (uint8_t)base_of(values)};
    for (int at = 0; at < PAGE_VALUES; at++)
        page[at] = (uint8_t)((values[at] >> 8 & 0x80) | (values[at] & 0x7f));
    for (int at = 0; at < HALF_PAGE; at++)
        page[CODES_AT + at] = (uint8_t)(code_of(values[at], header.base) |
                                        code_of(values[at + HALF_PAGE], header.base) << 4);
    memset(page + HEADER_AT, 0, PAGE_BYTES - HEADER_AT);
    int escapes = list_escapes(values, page);
    if (escapes > MAX_ESCAPES) {
        memset(page + HEADER_AT, 0, PAGE_BYTES - HEADER_AT);
        header.overflowed = 1;
    } else {
        header.escapes = (uint16_t)escapes;
    }
    memcpy(page + HEADER_AT, &header, sizeof header);
}

/*
 * values [batch][heads][tokens][HEAD_DIM] and pages [batch][heads][pages][PAGE_BYTES], where elements
 * and bytes are without gaps; strides are of batch, heads, and tokens or pages.
 */
struct pages {
    uint16_t *values;
    uint8_t *pages;
    int64_t batch, heads, tokens, threads, value_strides[3], page_strides[3];
};

static void each_page(const struct pages *p, int packs) {
    int64_t count = (p->tokens + PAGE_TOKENS - 1) / PAGE_TOKENS, all = p->batch * p->heads * count;
#pragma omp parallel for schedule(dynamic, 4) num_threads((int)p->threads)
    for (int64_t i = 0; i < all; i++) {
        uint16_t room[PAGE_TOKENS][HEAD_DIM];
        int64_t row = i / count / p->heads, head = i / count % p->heads, number = i % count;
        int64_t first = number * PAGE_TOKENS, left = p->tokens - first;
        int64_t tokens = left < PAGE_TOKENS ? left : PAGE_TOKENS, step = p->value_strides[2];
        uint16_t *values =
            p->values + row * p->value_strides[0] + head * p->value_strides[1] + first * step;
        uint8_t *page = p->pages + row * p->page_strides[0] + head * p->page_strides[1] +
                        number * p->page_strides[2];
        int direct = tokens == PAGE_TOKENS && step == HEAD_DIM;
        if (!packs) unpack_page(page, direct ? values : room[0], page + PAGE_BYTES);
        if (packs && tokens < PAGE_TOKENS) memset(room, 0, sizeof room);
        for (int64_t token = 0; !direct && token < tokens; token++)
            if (packs)
                memcpy(room[token], values + token * step, sizeof room[token]);
            else
                memcpy(values + token * step, room[token], sizeof room[token]);
        if (packs) pack_page(direct ? values : room[0], page);
    }
}

void pack(const struct pages *p) { each_page(p, 1); }
void unpack(const struct pages *p) { each_page(p, 0); }
