/*
 * A few rows times a matrix of weights, as a decode step has them.
 *
 * Each weight is read once and little is done with it, so the aim is to read at the speed of memory.
 * Weights stay as the model has them, [out][in]: an output is a sum along one row of them. Compiled for
 * one element type and for ROWS (1 to 8) rows at a time.
 *
 * Sums are those of float32. The processor's own sums of bfloat16 pairs were slower: Zen 5, one thread,
 * two rows, 576 x 1536: 24 GB/s, and 30 this way.
 */
#include "elements.h"
#include "team.h"

#define SLOTS (ROWS <= 1 ? 1 : ROWS <= 2 ? 2 : ROWS <= 4 ? 4 : 8) /* rows, rounded up */
#define OUTS (LANES / SLOTS) /* outputs whose sums fill one vector */
#define STEP_BYTES 32768     /* weights that a thread takes at a time */

/* Up to LANES - 1 elements, and zeros behind them. */
INLINE vector load_some(const element *p, int64_t count) {
    element some[LANES] = {0};
    memcpy(some, p, count * sizeof *p);
    return load(some);
}

INLINE float as_float(const element *p) { return load_some(p, 1)[0]; }

/*
 * The sums for `now` outputs: lane `output * SLOTS + row`. Meanwhile the weights of the next ones are
 * fetched, which lie behind; a processor may not follow so many streams by itself.
 */
INLINE vector multiply_block(const element *x, const element *weights, int64_t in, int now) {
    vector dots[LANES];
    memset(dots, 0, sizeof dots);
    int64_t at = 0;
    for (; at + LANES <= in; at += LANES) {
        vector given[ROWS];
        UNROLL for (int row = 0; row < ROWS; row++) given[row] = load(x + row * in + at);
        UNROLL for (int out = 0; out < now; out++) {
            const element *p = weights + out * in + at;
            __builtin_prefetch(p + now * in, 0, 2);
            vector weight = load(p);
            UNROLL for (int row = 0; row < ROWS; row++)
                dots[out * SLOTS + row] += given[row] * weight;
        }
    }
    if (at < in)
        for (int row = 0; row < ROWS; row++) {
            vector given = load_some(x + row * in + at, in - at);
            for (int out = 0; out < now; out++)
                dots[out * SLOTS + row] += given * load_some(weights + out * in + at, in - at);
        }
    return sums(dots);
}

/* Outputs `first` to before `end`. */
static void multiply_part(const element *x, const element *weights, const element *bias, element *y,
                          int64_t in, int64_t out, int64_t first, int64_t end) {
    while (first < end) {
        int now = end - first < OUTS ? 1 : OUTS;
        const element *from = weights + first * in;
        vector sum = now == OUTS ? multiply_block(x, from, in, OUTS) : multiply_block(x, from, in, 1);
        for (int i = 0; i < now; i++, first++) {
            float more = bias ? as_float(bias + first) : 0.0f;
            for (int row = 0; row < ROWS; row++)
                y[row * out + first] = rounded(sum[i * SLOTS + row] + more);
        }
    }
}

/* x [ROWS][in], weights [out][in], bias [out] or null, y [ROWS][out], all without gaps. */
struct product {
    const element *x, *weights, *bias;
    element *y;
    int64_t in, out;
};

struct shared_product {
    struct product product;
    int64_t step, next; /* outputs that are taken at a time, and from which on they are left */
};

static void multiply_parts(void *given) {
    struct shared_product *shared = given;
    struct product p = shared->product;
    int64_t step = shared->step, first;
    while ((first = __atomic_fetch_add(&shared->next, step, __ATOMIC_RELAXED)) < p.out) {
        int64_t end = first + step < p.out ? first + step : p.out;
        multiply_part(p.x, p.weights, p.bias, p.y, p.in, p.out, first, end);
    }
}

/*
 * By the threads of a team, or without one by as many as torch is set to. They take parts one after
 * another, for cores are not equally fast; weights of one part are one thread's.
 */
void multiply_in(const struct product *p, struct team *team) {
    int64_t row_bytes = (p->in ? p->in : 1) * (int64_t)sizeof(element);
    int64_t step = (STEP_BYTES / row_bytes + OUTS) / OUTS * OUTS;
    struct shared_product shared = {*p, step, 0};
    share(team, p->out <= 2 * step ? 1 : threads_of(team), multiply_parts, &shared);
}

void multiply(const struct product *p) { multiply_in(p, 0); }
