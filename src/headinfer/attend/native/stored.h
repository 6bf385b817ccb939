/*
 * Keys and values as they are stored: elements, or, where PACKED is defined, pages of 64 tokens, which
 * are unpacked into a thread's own memory, a block at a time. Tokens are counted from where a head's
 * begin, for a page is read as a whole.
 *
 * Whoever includes this defines, besides HEAD_DIM, BLOCK: tokens of a block.
 */
#ifdef PACKED
#if defined(INT8_PAGES) || defined(FP8_PAGES)
#include "eight_bits.h"
#else
#include "pages.h"
#endif
typedef uint8_t stored;
#define ROW (PAGE_BYTES / PAGE_TOKENS) /* a token's part of a page, rounded down: for prefetching */
#define ROOM (BLOCK + PAGE_TOKENS)     /* tokens of the pages that a block may have a part of */
#define FETCHED (BLOCK / 2 * HEAD_DIM) /* of the next block, while this one is unpacked */
#else
typedef element stored;
#define ROW HEAD_DIM
#define ROOM BLOCK
#define FETCHED 0
#endif

/* What is fetched of a block while another one is attended: of each token, the same part of the rest. */
#define REST (ROW - FETCHED / BLOCK)

/*
 * Return `count` tokens from `first` on, in `room` for the pages they lie in, or where they are. If a
 * block is unpacked, FETCHED of what lies at `ahead` is fetched meanwhile; of fewer tokens, less.
 */
INLINE const element *rows_of(const stored *from, int64_t first, int64_t count,
                              element room[][HEAD_DIM], const stored *ahead) {
#ifdef PACKED
    int64_t page = first / PAGE_TOKENS, end = (first + count + PAGE_TOKENS - 1) / PAGE_TOKENS;
    for (int64_t i = 0; page + i < end; i++)
        unpack_page(from + (page + i) * PAGE_BYTES, room[i * PAGE_TOKENS], ahead + i * HALF_PAGE);
    return room[first % PAGE_TOKENS];
#else
    (void)room, (void)count, (void)ahead;
    return from + first * HEAD_DIM;
#endif
}
