/*
 * Merging partial results of one query row by their log-sum-exp. Partials are merged in three places:
 * here for all C kernels and jobs, in partial.py by torch, in triton_merge.py on CUDA. There is no
 * fourth.
 */
#include <math.h>

/*
 * Merge `count` partials of one row into out [dim] and lse: each `out_step` floats behind the one
 * before, and their LSE `lse_step`. Without any, or where none saw a key, the output is 0.
 */
static void merge_row(const float *outs, int64_t out_step, const float *lses, int64_t lse_step,
                      int64_t count, int64_t dim, float *out, float *lse) {
    float highest = -INFINITY, total = 0;
    for (int64_t i = 0; i < count; i++)
        if (lses[i * lse_step] > highest) highest = lses[i * lse_step];
    memset(out, 0, dim * sizeof *out);
    for (int64_t i = 0; i < count; i++) {
        const float *part = outs + i * out_step;
        if (lses[i * lse_step] == -INFINITY) continue;
        float weight = expf(lses[i * lse_step] - highest);
        total += weight;
        for (int64_t d = 0; d < dim; d++) out[d] += weight * part[d];
    }
    if (total != 0)
        for (int64_t d = 0; d < dim; d++) out[d] /= total;
    *lse = total != 0 ? highest + logf(total) : -INFINITY;
}
