/*
 * All heads of a decode step, by the `attend_part` of whoever includes this for ROWS rows of a head,
 * or as many as ROWS_OF makes of those that are asked for.
 */
#include "merge.h"
#include "parts.h"
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
 * Attend `heads` heads, each in `splits` stretches of its keys, on `threads` threads, which take one
 * stretch after another: cores are not equally fast. (Of a virtual machine's 16 some shared a core,
 * and took 1.5 ms for what the others did in 0.8.)
 * query [heads][rows][HEAD_DIM]; `count` keys and values from `first` on, with `key_stride` and
 * `value_stride` elements, or bytes of pages, from head to head; out [heads][rows][HEAD_DIM], lse
 * [heads][rows]. With more than one split there is room in `parts` for out and then lse
 * [heads][splits] times as large.
 */
void attend_heads(const float *query, const stored *keys, const stored *values, int64_t key_stride,
                  int64_t value_stride, int64_t first, int64_t count, int64_t heads, int64_t splits,
                  float scale, float *parts, float *out, float *lse, int64_t rows, int threads) {
    int64_t size = ROWS_OF(rows) * HEAD_DIM;
    float *part_outs = splits > 1 ? parts : out;
    float *part_lses = splits > 1 ? parts + heads * splits * size : lse;
#pragma omp parallel num_threads(threads)
    {
        uint32_t mode = flush_tiny();
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < heads * splits; part++) {
            int64_t head = part / splits, split = part % splits;
            int64_t start = part_start(first, count, split, splits);
            int64_t end = part_start(first, count, split + 1, splits);
            attend_stretch(query + head * size, keys + head * key_stride, values + head * value_stride,
                           start, end - start, scale, part_outs + part * size,
                           part_lses + part * ROWS_OF(rows), rows);
        }
        if (splits > 1) {
#pragma omp for
            for (int64_t row = 0; row < heads * ROWS_OF(rows); row++) {
                int64_t of_head = row / ROWS_OF(rows) * splits * ROWS_OF(rows);
                int64_t at = of_head + row % ROWS_OF(rows);
                merge_row(part_outs + at * HEAD_DIM, size, part_lses + at, ROWS_OF(rows),
                          splits, HEAD_DIM, out + row * HEAD_DIM, lse + row);
            }
        }
        restore(mode);
    }
}

#ifndef PACKED
#include "token.h"
#endif
