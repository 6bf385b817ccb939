/*
 * All heads of a decode step, by the `attend_part` of whoever includes this for ROWS rows of a head,
 * or as many as ROWS_OF makes of those that are asked for.
 */
#include "merge.h"
#include "parts.h"
#include "team.h"
#include "tiles.h"

#ifndef ROWS_OF
#define ROWS_OF(rows) ROWS /* which the compiler knows */
#endif

/*
 * Attend a stretch of one head's keys: query [rows][HEAD_DIM], `count` keys and values from `first` on,
 * out [rows][HEAD_DIM], lse [rows]. The thread's small numbers should be off, see `flush_tiny`.
 */
void attend_stretch(const float *query, const void *keys, const void *values, int64_t first,
                    int64_t count, float scale, float *out, float *lse, int64_t rows) {
    struct tile_config before;
    begin_tiles(&before);
    attend_part(query, keys, values, first, count, scale, out, lse, ROWS_OF(rows));
    end_tiles(&before);
}

/*
 * A call for `heads` heads, each in `splits` stretches of its keys. query [heads][rows][HEAD_DIM];
 * `count` keys and values from `first` on, with `key_stride` and `value_stride` elements, or bytes of
 * pages, from head to head; out [heads][rows][HEAD_DIM], lse [heads][rows]. With more than one split
 * `part_outs` and `part_lses` are [heads][splits] times as large; else they are `out` and `lse`.
 */
struct heads {
    const float *query;
    const stored *keys, *values;
    float *part_outs, *part_lses, *out, *lse;
    int64_t key_stride, value_stride, first, count, heads, splits, rows;
    int64_t next, next_row; /* the stretch, and then the row to merge, that is taken next */
    float scale;
};

/* Attend one stretch after another. */
static void attend_stretches(void *given) {
    struct heads *h = given;
    int64_t rows = ROWS_OF(h->rows), size = rows * HEAD_DIM, part;
    uint32_t mode = flush_tiny();
    while ((part = __atomic_fetch_add(&h->next, 1, __ATOMIC_RELAXED)) < h->heads * h->splits) {
        int64_t head = part / h->splits, split = part % h->splits;
        int64_t start = part_start(h->first, h->count, split, h->splits);
        int64_t end = part_start(h->first, h->count, split + 1, h->splits);
        attend_stretch(h->query + head * size, h->keys + head * h->key_stride,
                       h->values + head * h->value_stride, start, end - start, h->scale,
                       h->part_outs + part * size, h->part_lses + part * rows, rows);
    }
    restore(mode);
}

/* Merge the stretches of one row after another. */
static void merge_rows(void *given) {
    struct heads *h = given;
    int64_t rows = ROWS_OF(h->rows), row;
    uint32_t mode = flush_tiny();
    while ((row = __atomic_fetch_add(&h->next_row, 1, __ATOMIC_RELAXED)) < h->heads * rows) {
        int64_t at = row / rows * h->splits * rows + row % rows;
        merge_row(h->part_outs + at * HEAD_DIM, rows * HEAD_DIM, h->part_lses + at, rows, h->splits,
                  HEAD_DIM, h->out + row * HEAD_DIM, h->lse + row);
    }
    restore(mode);
}

/*
 * Attend on `threads` threads, of a team if there is one, which take one stretch after another: cores
 * are not equally fast. (Of a virtual machine's 16 some shared a core, and took 1.5 ms for what the
 * others did in 0.8.) See `struct heads`; with more than one split there is room in `parts` for
 * `part_outs` and then `part_lses`.
 */
static void attend_heads_in(struct team *team, const float *query, const stored *keys,
                            const stored *values, int64_t key_stride, int64_t value_stride,
                            int64_t first, int64_t count, int64_t heads, int64_t splits, float scale,
                            float *parts, float *out, float *lse, int64_t rows, int threads) {
    int64_t floats = heads * splits * ROWS_OF(rows) * HEAD_DIM;
    struct heads h = {
        .query = query, .keys = keys, .values = values, .out = out, .lse = lse,
        .part_outs = splits > 1 ? parts : out, .part_lses = splits > 1 ? parts + floats : lse,
        .key_stride = key_stride, .value_stride = value_stride, .first = first, .count = count,
        .heads = heads, .splits = splits, .rows = rows, .scale = scale,
    };
    share(team, threads, attend_stretches, &h);
    if (splits > 1) share(team, threads, merge_rows, &h);
}

void attend_heads(const float *query, const stored *keys, const stored *values, int64_t key_stride,
                  int64_t value_stride, int64_t first, int64_t count, int64_t heads, int64_t splits,
                  float scale, float *parts, float *out, float *lse, int64_t rows, int threads) {
    attend_heads_in(0, query, keys, values, key_stride, value_stride, first, count, heads, splits,
                    scale, parts, out, lse, rows, threads);
}

#ifndef PACKED
#include "token.h"
#endif
