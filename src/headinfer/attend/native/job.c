/*
 * A decode step's attention as one call that a driver can make: no Python, and so no waiting for its
 * lock, which the thread that launches kernels takes all the time. On an H100's host the same reading
 * of keys and values took 4.3 ms as calls from Python and 1.5 ms alone.
 *
 * Compiled for one element type. What is attended with is `attend_stretch` of `heads.h`, compiled for
 * the shape.
 */
#define _GNU_SOURCE /* for the cores of threads */
#include <time.h>

#include "elements.h"
#include "merge.h"
#include "parts.h"
#include "workers.h"

typedef void attend_stretch(const float *query, const void *keys, const void *values, int64_t first,
                            int64_t count, float scale, float *out, float *lse, int64_t rows);

/* Consecutive tokens from `first` on, in `splits` parts; strides are bytes from head to head. */
struct span {
    attend_stretch *attend; /* compiled for their form */
    const char *keys, *values;
    int64_t key_stride, value_stride, first, tokens, splits;
};

/*
 * query [heads][rows][dim]; out [heads][rows][dim] and lse [heads][rows], which are written. Rows of
 * a batch are as many heads more. All spans of a head have `splits` parts together. In `scratch` there
 * is room for the query in float32, for an `out` and then an `lse` of each part of each head, and for
 * a count of 4 bytes for each head.
 */
struct job {
    struct workers *workers;
    const element *query;
    float *out, *lse, *scratch;
    const struct span *spans;
    int64_t splits, heads, rows, dim;
    double start_s, end_s; /* when it ran, by CLOCK_MONOTONIC */
    int64_t next;          /* the part that is taken next */
    float scale;
    int32_t finished; /* the last that is written */
};

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Where the outputs of all parts lie in `scratch`; their LSE and the counts follow, in this order. */
static float *outs_of(const struct job *job) {
    return job->scratch + job->heads * job->rows * job->dim;
}
static float *lses_of(const struct job *job) {
    return outs_of(job) + job->heads * job->splits * job->rows * job->dim;
}
/* How many parts of each head are not done. */
static int32_t *left_of(const struct job *job) {
    return (int32_t *)(lses_of(job) + job->heads * job->splits * job->rows);
}

/* Attend one part after another until all are taken; who does the last of a head merges it. */
static void attend_parts(void *given) {
    struct job *job = given;
    int64_t head_size = job->rows * job->dim, parts = job->heads * job->splits, at;
    float *outs = outs_of(job), *lses = lses_of(job);
    int32_t *left = left_of(job);
    uint32_t mode = flush_tiny();
    while ((at = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < parts) {
        int64_t head = at / job->splits, part = at % job->splits;
        const struct span *span = job->spans;
        while (part >= span->splits) part -= span++->splits;
        int64_t start = part_start(span->first, span->tokens, part, span->splits);
        int64_t end = part_start(span->first, span->tokens, part + 1, span->splits);
        span->attend(job->scratch + head * head_size, span->keys + head * span->key_stride,
                     span->values + head * span->value_stride, start, end - start, job->scale,
                     outs + at * head_size, lses + at * job->rows, job->rows);
        if (__atomic_sub_fetch(&left[head], 1, __ATOMIC_ACQ_REL)) continue;
        int64_t first = head * job->splits;
        for (int64_t row = 0; row < job->rows; row++)
            merge_row(outs + first * head_size + row * job->dim, head_size,
                      lses + first * job->rows + row, job->rows, job->splits, job->dim,
                      job->out + head * head_size + row * job->dim,
                      job->lse + head * job->rows + row);
    }
    restore(mode);
}

/* Do a job; nothing of it is touched after that. */
void run_job(void *given) {
    struct job *job = given;
    __atomic_store_n(&job->finished, 0, __ATOMIC_RELEASE); /* where it is done again and again */
    job->start_s = now_s();
    int64_t rows = job->heads * job->rows, elements = rows * job->dim;
    uint32_t mode = flush_tiny();
    for (int64_t i = 0; i < elements; i += LANES) put(job->scratch + i, load(job->query + i));
    restore(mode);
    for (int64_t head = 0; head < job->heads; head++) left_of(job)[head] = (int32_t)job->splits;
    job->next = 0;
    if (!job->splits) /* without a token there is nothing to merge */
        for (int64_t row = 0; row < rows; row++)
            merge_row(NULL, 0, NULL, 0, 0, job->dim, job->out + row * job->dim, job->lse + row);
    else if (job->workers)
        work_together(job->workers, job);
    else
        attend_parts(job);
    job->end_s = now_s();
    __atomic_store_n(&job->finished, 1, __ATOMIC_RELEASE);
}

/* Threads that help with jobs until `stop_workers`; null where there is no memory for them. */
struct workers *start_workers(int64_t count) { return begin_workers(count, attend_parts); }
void stop_workers(struct workers *w) { end_workers(w); }
