/*
 * Where the parts begin into which a head's tokens are split. In pages, as packed tokens are read, so
 * that no page is read twice, and the same tokens give the same bits in every form.
 */
#define PART_TOKENS 64

/* The first token of a part, where all `count` tokens begin at `first`. */
static inline int64_t part_start(int64_t first, int64_t count, int64_t part, int64_t parts) {
    int64_t at = first + count * part / parts;
    if (part == 0 || part == parts) return at;
    at = at / PART_TOKENS * PART_TOKENS;
    return at < first ? first : at;
}
