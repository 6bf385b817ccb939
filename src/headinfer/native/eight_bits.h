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

#if defined(ELEMENT_IS_BFLOAT16) && defined(__AVX512BF16__) && HEAD_DIM % 32 == 0
/* What 16 bytes stand for: see `number_of`. */
INLINE __m512 numbers_of(const uint8_t *codes) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)codes);
#ifdef INT8_PAGES
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
    __m512i code = _mm512_cvtepu8_epi32(bytes), normal = _mm512_set1_epi32(1 << 23);
    __m512i bits = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x7f)), 20);
    __mmask16 small = _mm512_cmplt_epu32_mask(bits, normal);
    bits = _mm512_add_epi32(bits, _mm512_set1_epi32(120 << 23));
    __m512 number = (__m512)_mm512_mask_add_epi32(bits, small, bits, normal);
    number = _mm512_mask_sub_ps(number, small, number, _mm512_set1_ps(0x1p-6f));
    code = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
    return (__m512)_mm512_or_si512((__m512i)number, code);
#endif
}

/*
 * A token's elements. The processor rounds them, so that this takes less time than reading them; GCC's
 * own vectors took longer than the memory. Numbers too small for a normal bfloat16 become 0, as in all
 * of a thread that flushes them.
 */
INLINE void put_token(element *to, const uint8_t *codes, const float *scales) {
    UNROLL for (int i = 0; i < HEAD_DIM; i += 32) {
        __m512 early = numbers_of(codes + i) * _mm512_loadu_ps(scales + i);
        __m512 late = numbers_of(codes + i + 16) * _mm512_loadu_ps(scales + i + 16);
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(late, early));
    }
}
#else
INLINE void put_token(element *to, const uint8_t *codes, const float *scales) {
    for (int i = 0; i < HEAD_DIM; i++) to[i] = element_of(number_of(codes[i]) * scales[i]);
}
#endif

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
        put_token(to, page, scales);
    }
}
