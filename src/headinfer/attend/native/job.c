/*
 * A decode step's attention as one call that a driver can make: no Python, and so no waiting for its
 * lock, which the thread that launches kernels takes all the time. On an H100's host the same reading
 * of keys and values took 4.3 ms as calls from Python and 1.5 ms alone.
 *
 * Compiled for one element type. What is attended with is `attend_heads` of `heads.h`, compiled for
 * the shape.
 */
#include <math.h>
#include <time.h>

#include "elements.h"

typedef void attend_heads(const float *query, const element *keys, const element *values,
                          int64_t key_stride, int64_t value_stride, int64_t count, int64_t heads,
                          int64_t splits, float scale, float *out, float *lse, int threads);

/* Some consecutive tokens; strides are elements from head to head. */
struct span {
    const element *keys, *values;
    int64_t key_stride, value_stride, tokens, splits;
};

/*
 * query [heads][rows][dim]; out [heads][rows][dim] and lse [heads][rows], which are written. Rows of
 * a batch are as many heads more. In `scratch` there is room for the query in float32, and behind
 * it, span by span, for out [heads][splits][rows][dim] and then lse [heads][splits][rows].
 */
struct job {
    attend_heads *attend;
    const element *query;
    float *out, *lse, *scratch;
    const struct span *spans;
    int64_t num_spans, heads, rows, dim;
    double start_s, end_s; /* when it ran, by CLOCK_MONOTONIC */
    float scale;
    int32_t threads;
    int32_t finished; /* the last that is written */
};

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Call `what` for each partial of one row of one head: its output is `part`, its LSE `part_lse`. */
#define EACH_PART(what) \
    do { \
        const float *outs = parts; \
        for (int64_t i = 0; i < job->num_spans; i++) { \
            int64_t splits = job->spans[i].splits, all_rows = job->heads * splits * job->rows; \
            const float *lses = outs + all_rows * job->dim; \
            if (job->spans[i].tokens) \
                for (int64_t split = 0; split < splits; split++) { \
                    int64_t at = (head * splits + split) * job->rows + row; \
                    const float *part = outs + at * job->dim, part_lse = lses[at]; \
                    (void)part; \
                    what; \
                } \
            outs = lses + all_rows; \
        } \
    } while (0)

/* Merge the partials of one row of one head; where no key was visible, the output is 0. */
static void merge_row(const struct job *job, const float *parts, int64_t head, int64_t row) {
    float *out = job->out + (head * job->rows + row) * job->dim;
    float highest = -INFINITY, total = 0;
    EACH_PART(if (part_lse > highest) highest = part_lse);
    memset(out, 0, job->dim * sizeof *out);
    EACH_PART(if (part_lse != -INFINITY) {
        float weight = expf(part_lse - highest);
        total += weight;
        for (int64_t d = 0; d < job->dim; d++) out[d] += weight * part[d];
    });
    if (total != 0)
        for (int64_t d = 0; d < job->dim; d++) out[d] /= total;
    job->lse[head * job->rows + row] = total != 0 ? highest + logf(total) : -INFINITY;
}

/* Do a job; nothing of it is touched after that. */
void run_job(void *given) {
    struct job *job = given;
    job->start_s = now_s();
    uint32_t mode = flush_tiny();
    int64_t elements = job->heads * job->rows * job->dim;
    for (int64_t i = 0; i < elements; i += LANES) put(job->scratch + i, load(job->query + i));
    float *parts = job->scratch + elements, *out = parts;
    for (int64_t i = 0; i < job->num_spans; i++) {
        const struct span *span = &job->spans[i];
        float *lse = out + elements * span->splits;
        if (span->tokens)
            job->attend(job->scratch, span->keys, span->values, span->key_stride, span->value_stride,
                        span->tokens, job->heads, span->splits, job->scale, out, lse, job->threads);
        out = lse + job->heads * job->rows * span->splits;
    }
    for (int64_t head = 0; head < job->heads; head++)
        for (int64_t row = 0; row < job->rows; row++) merge_row(job, parts, head, row);
    restore(mode);
    job->end_s = now_s();
    __atomic_store_n(&job->finished, 1, __ATOMIC_RELEASE);
}
