/*
 * Attention of many query rows to many keys, with the log-sum-exp: a tile of a prefill chunk.
 *
 * Blocks of keys and values are packed for matrix products, and each serves all rows of a task.
 * Compiled for one head_dim and element type at a time, by the definitions HEAD_DIM (a multiple of
 * PANEL) and the element type; WITHOUT_TILES leaves the processor's matrix unit (AMX) alone.
 */
#include <math.h>

#define BLOCK 512     /* tokens packed at once: 512 KiB of float32 keys and values of 128 */
#define ROW_BLOCK 96  /* rows whose scores are held at once; a multiple of ROWS_AT_ONCE */
#define VECTORS 2
#if defined(ELEMENT_IS_BFLOAT16) && defined(__AVX512BF16__) && defined(__AMX_TILE__) && \
    defined(__AMX_BF16__) && !defined(WITHOUT_TILES)
#define TILES 1
#define ROWS_AT_ONCE 32
#else
#define TILES 0
#ifdef __AVX512F__
#define ROWS_AT_ONCE 12 /* as many as leave registers for the factors */
#else
#define ROWS_AT_ONCE 6
#endif
#endif

#include "panels.h"
#include "tiles.h"

_Static_assert(PAIRS || !TILES, "the matrix unit multiplies pairs");

/* What one thread works in. */
struct workspace {
    operand keys[BLOCK / PANEL][DIM_STEPS][PANEL];
    operand values[HEAD_DIM / PANEL][BLOCK_STEPS][PANEL];
    operand query[ROW_BLOCK][DIM_STEPS];
    float scores[ROW_BLOCK][BLOCK];
    operand weights[ROW_BLOCK][BLOCK_STEPS];
    float out[ROW_BLOCK][HEAD_DIM];
};

int64_t workspace_bytes(void) { return sizeof(struct workspace); }

#if TILES
/* c [32][32] = (add ? c : 0) + a [32][steps] x b [steps][32], in four tiles of 16 x 16. */
INLINE void multiply_panel(const operand *a, int64_t a_stride, const operand *b, int64_t steps,
                           float *c, int64_t c_stride, int add, const char *fetched) {
    (void)fetched;
    float *below = c + 16 * c_stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (add) {
        _tile_loadd(0, c, c_stride * 4);
        _tile_loadd(1, c + 16, c_stride * 4);
        _tile_loadd(2, below, c_stride * 4);
        _tile_loadd(3, below + 16, c_stride * 4);
    }
    for (int64_t step = 0; step < steps; step += 16) {
        _tile_loadd(4, a + step, a_stride * 4);
        _tile_loadd(5, a + 16 * a_stride + step, a_stride * 4);
        _tile_loadd(6, b + step * PANEL, PANEL * 4);
        _tile_loadd(7, b + step * PANEL + 16, PANEL * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_stride * 4);
    _tile_stored(1, c + 16, c_stride * 4);
    _tile_stored(2, below, c_stride * 4);
    _tile_stored(3, below + 16, c_stride * 4);
}
#endif

/* c [rows][panels * PANEL] = (add ? c : 0) + a [rows][steps] x b [panels][steps][PANEL] */
static void multiply(const operand *a, const operand *b, int64_t steps, float *c, int64_t rows,
                     int64_t panels, int add) {
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t row = 0; row < rows; row += ROWS_AT_ONCE)
            multiply_panel(a + row * steps, steps, b + panel * steps * PANEL, steps,
                           c + (row * panels + panel) * PANEL, panels * PANEL, add, 0);
}

/* Take over query rows; what is missing to whole products becomes 0. */
static void pack_query(const element *query, int64_t rows, int64_t padded, struct workspace *work) {
    for (int64_t row = 0; row < padded; row++)
        for (int step = 0; step < DIM_STEPS; step += LANES) {
            const element *from = query + row * HEAD_DIM + step * PER_STEP;
            put(&work->query[row][step], row < rows ? load_operands(from) : all(0));
        }
}

/* Attend some rows to one packed block of `count` keys, the first of them or one more. */
static void attend_block(const element *query, int64_t rows, int64_t count, int first, float scale,
                         float *out, float *total, float *highest, struct workspace *work) {
    int64_t padded = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * ROWS_AT_ONCE;
    float *sum = padded == rows ? out : work->out[0];
    if (sum != out && !first) memcpy(sum, out, rows * HEAD_DIM * sizeof *out);
    pack_query(query, rows, padded, work);
    multiply(work->query[0], work->keys[0][0], DIM_STEPS, work->scores[0], padded, BLOCK / PANEL, 0);
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t token = count; token < BLOCK; token++) work->scores[row][token] = -INFINITY;
        if (first) highest[row] = NOTHING, total[row] = 0;
        float shrink =
            weigh(work->scores[row], work->weights[row], scale, highest + row, total + row);
        if (!first && shrink != 1)
            for (int dim = 0; dim < HEAD_DIM; dim++) sum[row * HEAD_DIM + dim] *= shrink;
    }
    multiply(work->weights[0], work->values[0][0], BLOCK_STEPS, sum, padded, HEAD_DIM / PANEL,
             !first);
    if (sum != out) memcpy(out, sum, rows * HEAD_DIM * sizeof *out);
}

/* Attend `rows` queries to `count` keys of one head. */
static void attend_part(const element *query, const element *keys, const element *values,
                        int64_t rows, int64_t count, float scale, float *out, float *lse,
                        float *highest, struct workspace *work) {
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t now = count - start < BLOCK ? count - start : BLOCK;
        const element *k = keys + start * HEAD_DIM, *v = values + start * HEAD_DIM;
        for (int panel = 0; panel < BLOCK / PANEL; panel++)
            pack_keys(k + panel * PANEL * HEAD_DIM, now - panel * PANEL, work->keys[panel]);
        for (int panel = 0; panel < HEAD_DIM / PANEL; panel++)
            pack_values(v + panel * PANEL, now, work->values[panel]);
        for (int64_t row = 0; row < rows; row += ROW_BLOCK)
            attend_block(query + row * HEAD_DIM, rows - row < ROW_BLOCK ? rows - row : ROW_BLOCK,
                         now, start == 0, scale * LOG2_E, out + row * HEAD_DIM, lse + row,
                         highest + row, work);
    }
    for (int64_t row = 0; row < rows; row++) {
        float total = lse[row];
        for (int dim = 0; dim < HEAD_DIM; dim++) out[row * HEAD_DIM + dim] /= total;
        lse[row] = (highest[row] + log2f(total)) * LN_2;
    }
}

int omp_get_thread_num(void);

/*
 * Attend `heads` heads, the rows of each in `splits` tasks, on `threads` threads.
 * query [heads][rows][HEAD_DIM]; keys and values with `key_stride` and `value_stride` elements from
 * head to head; out [heads][rows][HEAD_DIM], lse and highest (scratch) [heads][rows];
 * workspace [threads] of `workspace_bytes`, on a boundary of 64 bytes.
 */
void attend_heads(const element *query, const element *keys, const element *values,
                  int64_t key_stride, int64_t value_stride, int64_t rows, int64_t count,
                  int64_t heads, int64_t splits, float scale, float *out, float *lse,
                  float *highest, struct workspace *workspace, int threads) {
#pragma omp parallel num_threads(threads)
    {
        struct tile_config before;
        begin_tiles(&before);
        uint32_t mode = flush_tiny();
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < heads * splits; part++) {
            int64_t head = part / splits, split = part % splits;
            int64_t start = rows * split / splits, end = rows * (split + 1) / splits;
            int64_t at = head * rows + start;
            attend_part(query + at * HEAD_DIM, keys + head * key_stride,
                        values + head * value_stride, end - start, count, scale,
                        out + at * HEAD_DIM, lse + at, highest + at,
                        workspace + omp_get_thread_num());
        }
        restore(mode);
        end_tiles(&before);
    }
}
