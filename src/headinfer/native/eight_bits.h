/*
 * Pages in 8 bits a value: unpacking one. See headinfer/eight_bits/layout.py.
 *
 * By definition at compilation: HEAD_DIM, PAGE_BYTES, and INT8_PAGES or FP8_PAGES.
 */
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

/*
 * Unpack a page into [PAGE_TOKENS][HEAD_DIM] elements. Meanwhile HALF_PAGE bytes from `ahead` on are
 * fetched, for memory would be idle; nothing needs to be there.
 */
static inline void unpack_page(const uint8_t *page, element *to, const uint8_t *ahead) {
    uint16_t halves[HEAD_DIM];
    float scales[HEAD_DIM];
    memcpy(halves, page + PAGE_VALUES, PAGE_BYTES - PAGE_VALUES);
    if (halves[0] == RAW_SCALE) {
        uint64_t address;
        memcpy(&address, page, sizeof address);
        memcpy(to, (const void *)(uintptr_t)address, PAGE_VALUES * sizeof *to);
        return;
    }
    for (int i = 0; i < HEAD_DIM; i++) {
#ifdef INT8_PAGES
        scales[i] = scale_of(halves[i]);
#else
        scales[i] = scale_of(halves[0]);
#endif
    }
    for (int token = 0; token < PAGE_TOKENS; token++, page += HEAD_DIM, to += HEAD_DIM) {
        for (int byte = 0; byte < HEAD_DIM / 2; byte += 64)
            __builtin_prefetch(ahead + token * (HEAD_DIM / 2) + byte, 0, 2);
        for (int i = 0; i < HEAD_DIM; i++)
            to[i] = element_of(number_of(page[i]) * scales[i]);
    }
}
