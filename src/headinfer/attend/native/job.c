/*
 * A decode step's attention as one call that a driver can make: no Python, and so no waiting for its
 * lock, which the thread that launches kernels takes all the time. On an H100's host the same reading
 * of keys and values took 4.3 ms as calls from Python and 1.5 ms alone.
 *
 * Compiled for one element type. What is attended with is `attend_heads` of `heads.h`, compiled for
 * the shape.
 */
#include <time.h>

#include "elements.h"
#include "merge.h"

typedef void attend_heads(const float *query, const element *keys, const element *values,
                          int64_t key_stride, int64_t value_stride, int64_t count, int64_t heads,
                          int64_t splits, float scale, float *parts, float *out, float *lse,
                          int threads);

/* Some consecutive tokens; strides are elements from head to head. */
struct span {
    const element *keys, *values;
    int64_t key_stride, value_stride, tokens, splits;
};

/*
 * query [heads][rows][dim]; out [heads][rows][dim] and lse [heads][rows], which are written. Rows of
 * a batch are as many heads more. In `scratch` there is room for the query in float32; behind it,
 * where there are several spans, for an `out` of each and then an `lse` of each; and behind those for
 * the `parts` of the span with the most splits.
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

/* Do a job; nothing of it is touched after that. */
void run_job(void *given) {
    struct job *job = given;
    job->start_s = now_s();
    uint32_t mode = flush_tiny();
    int64_t rows = job->heads * job->rows, elements = rows * job->dim;
    int64_t merged = job->num_spans == 1 ? 0 : job->num_spans;
    for (int64_t i = 0; i < elements; i += LANES) put(job->scratch + i, load(job->query + i));
    float *outs = merged ? job->scratch + elements : job->out;
    float *lses = merged ? outs + merged * elements : job->lse;
    float *parts = job->scratch + elements + merged * (elements + rows);
    for (int64_t i = 0; i < job->num_spans; i++) {
        const struct span *span = &job->spans[i];
        job->attend(job->scratch, span->keys, span->values, span->key_stride, span->value_stride,
                    span->tokens, job->heads, span->splits, job->scale, parts, outs + i * elements,
                    lses + i * rows, job->threads);
    }
    if (job->num_spans != 1)
        for (int64_t row = 0; row < rows; row++)
            merge_row(outs + row * job->dim, elements, lses + row, rows, job->num_spans, job->dim,
                      job->out + row * job->dim, job->lse + row);
    restore(mode);
    job->end_s = now_s();
    __atomic_store_n(&job->finished, 1, __ATOMIC_RELEASE);
}
