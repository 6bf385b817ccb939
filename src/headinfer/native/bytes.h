/*
 * Vectors of bytes, where the processor has them: AT_ONCE of them, which words are made of.
 */
#if defined(__AVX512BW__) || defined(__AVX2__)
#ifdef __AVX512BW__
#define AT_ONCE 64 /* values in a vector of bytes */
typedef __m512i bytes;
#define DO(operation) _mm512_##operation
#define GET_BYTES(p) _mm512_loadu_si512(p)
#define PUT_BYTES(p, x) _mm512_storeu_si512(p, x)
#define BOTH(a, b) _mm512_and_si512(a, b)
#define EITHER(a, b) _mm512_or_si512(a, b)
#define BUT_NOT(a, b) _mm512_andnot_si512(b, a)
#define TABLE(t) _mm512_broadcast_i32x4(t)
/* Quarters of words such that interleaving lower and upper halves of lanes keeps the order. */
INLINE bytes spread(bytes x) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), x);
}
#else
#define AT_ONCE 32
typedef __m256i bytes;
#define DO(operation) _mm256_##operation
#define GET_BYTES(p) _mm256_loadu_si256((const __m256i *)(p))
#define PUT_BYTES(p, x) _mm256_storeu_si256((__m256i *)(p), x)
#define BOTH(a, b) _mm256_and_si256(a, b)
#define EITHER(a, b) _mm256_or_si256(a, b)
#define BUT_NOT(a, b) _mm256_andnot_si256(b, a)
#define TABLE(t) _mm256_broadcastsi128_si256(t)
INLINE bytes spread(bytes x) { return _mm256_permute4x64_epi64(x, 0xd8); }
#endif

/* Words by their lower and upper bytes, of bytes that were `spread`. */
INLINE void put_words(uint16_t *to, bytes low, bytes high) {
    PUT_BYTES(to, DO(unpacklo_epi8)(low, high));
    PUT_BYTES(to + AT_ONCE / 2, DO(unpackhi_epi8)(low, high));
}
#endif
