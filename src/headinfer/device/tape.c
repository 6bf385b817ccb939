/*
 * A tape: small operations of torch, one after another, with nothing of Python between them.
 *
 * Each gives the bits that torch gives. It computes in float32 and rounds once, to the nearest, which
 * says everything of all but means. Their sums are taken in torch's order.
 * Compiled for one element type of 16 bits beside float32.
 */
#include "elements.h"
#include "team.h"
#include <math.h>

#define BLOCK 512 /* elements at once: three blocks of float32 stay in the first cache */
#define AXES 4

enum { CALL, COPY, NEGATE, SQUARE, RSQRT, ADD_UP, SUBTRACT, MULTIPLY, DIVIDE, MEAN, LOOK_UP };
enum { FLOAT, ELEMENT };

/* What `tape.py` fills. The result comes first, then what is given. Strides are elements. */
struct operation {
    void (*call)(void *, struct team *);
    void *argument; /* of a call, or where a table is */
    void *memory[3];
    int64_t sizes[AXES];
    int64_t strides[3][AXES];
    int32_t kind;
    int32_t types[3];
    float value; /* a number that is given stands here */
};

INLINE float widened(element value) {
#if defined(ELEMENT_IS_BFLOAT16)
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
#else
    return (float)value;
#endif
}

static void read(float *restrict to, const void *from, int type, int64_t stride, int64_t count) {
    if (type == FLOAT) {
        const float *p = from;
        if (stride == 1)
            memcpy(to, p, count * sizeof *to);
        else
            for (int64_t i = 0; i < count; i++) to[i] = p[i * stride];
    } else {
        const element *p = from;
        if (stride == 1)
            for (int64_t i = 0; i < count; i++) to[i] = widened(p[i]);
        else
            for (int64_t i = 0; i < count; i++) to[i] = widened(p[i * stride]);
    }
}

static void write(void *to, const float *restrict from, int type, int64_t stride, int64_t count) {
    if (type == FLOAT) {
        float *p = to;
        for (int64_t i = 0; i < count; i++) p[i * stride] = from[i];
    } else if (stride == 1) {
        element *p = to;
        for (int64_t i = 0; i < count; i++) p[i] = rounded(from[i]);
    } else {
        element *p = to;
        for (int64_t i = 0; i < count; i++) p[i * stride] = rounded(from[i]);
    }
}

#define EACH(expression) \
    for (int64_t i = 0; i < count; i++) y[i] = (expression); \
    break

static void compute(int kind, float *restrict y, const float *restrict a, const float *restrict b,
                    int64_t count) {
    switch (kind) {
    case COPY: EACH(a[i]);
    case NEGATE: EACH(-a[i]);
    case SQUARE: EACH(a[i] * a[i]);
    case RSQRT: EACH(1.0f / sqrtf(a[i]));
    case ADD_UP: EACH(a[i] + b[i]);
    case SUBTRACT: EACH(a[i] - b[i]);
    case MULTIPLY: EACH(a[i] * b[i]);
    case DIVIDE: EACH(a[i] / b[i]);
    }
}

INLINE void *moved(void *memory, int type, int64_t elements) {
    return (char *)memory + elements * (int64_t)(type == FLOAT ? sizeof(float) : sizeof(element));
}

/* One run along the last axis. */
static void along(const struct operation *op, void *const start[3]) {
    const int64_t *last[3] = {&op->strides[0][AXES - 1], &op->strides[1][AXES - 1],
                              &op->strides[2][AXES - 1]};
    float a[BLOCK], b[BLOCK], y[BLOCK];
    for (int64_t at = 0; at < op->sizes[AXES - 1]; at += BLOCK) {
        int64_t left = op->sizes[AXES - 1] - at, count = left < BLOCK ? left : BLOCK;
        read(a, moved(start[1], op->types[1], at * *last[1]), op->types[1], *last[1], count);
        if (start[2])
            read(b, moved(start[2], op->types[2], at * *last[2]), op->types[2], *last[2], count);
        compute(op->kind, y, a, b, count);
        write(moved(start[0], op->types[0], at * *last[0]), y, op->types[0], *last[0], count);
    }
}

/* A number of float32 is torch's vector: each lane has four sums, and these have levels. */
#define SUMS 4
#define LEVELS 4

/* The four sums of one lane: of every `step`th vector's lane, `count` times four of them. */
static void sum_lane(const float *from, int64_t count, int64_t lanes, float sums[SUMS]) {
    float levels[LEVELS][SUMS] = {{0}};
    int power = 0;
    while ((int64_t)1 << power < count) power++;
    power = power / LEVELS > 4 ? power / LEVELS : 4;
    int64_t at = 0, some = (int64_t)1 << power;
    while (at + some <= count) {
        for (int64_t end = at + some; at < end; at++)
            for (int sum = 0; sum < SUMS; sum++)
                levels[0][sum] += from[(at * SUMS + sum) * lanes];
        for (int level = 1; level < LEVELS; level++) {
            for (int sum = 0; sum < SUMS; sum++) {
                levels[level][sum] += levels[level - 1][sum];
                levels[level - 1][sum] = 0;
            }
            if (at & (some - 1) << level * power) break;
        }
    }
    for (; at < count; at++)
        for (int sum = 0; sum < SUMS; sum++) levels[0][sum] += from[(at * SUMS + sum) * lanes];
    for (int sum = 0; sum < SUMS; sum++) {
        sums[sum] = levels[0][sum];
        for (int level = 1; level < LEVELS; level++) sums[sum] += levels[level][sum];
    }
}

static float mean(const float *from, int64_t count, int64_t lanes) {
    int64_t vectors = count / lanes, fours = vectors / SUMS;
    float total = 0;
    for (int64_t i = vectors * lanes; i < count; i++) total += from[i];
    for (int64_t lane = 0; lane < lanes; lane++) {
        float sums[SUMS];
        sum_lane(from + lane, fours, lanes, sums);
        for (int64_t i = fours * SUMS; i < vectors; i++) sums[0] += from[i * lanes + lane];
        for (int sum = 1; sum < SUMS; sum++) sums[0] += sums[sum];
        total += sums[0];
    }
    return total / (float)count;
}

#define VALUES 65536 /* of an element type, whose results by torch a table has */

/* Whether numbers below 2^-126 are 0 to this thread now, which torch lets users choose. */
static int flushes_tiny(void) {
    volatile float tiny = 1e-39f;
    return tiny * 1.0f == 0.0f;
}

/* One run along the last axis, without gaps. */
static void look_up(const struct operation *op, element *to, const element *from) {
    const element *table = (const element *)op->argument + (flushes_tiny() ? VALUES : 0);
    for (int64_t i = 0; i < op->sizes[AXES - 1]; i++) {
        uint16_t bits;
        memcpy(&bits, from + i, sizeof bits);
        to[i] = table[bits];
    }
}

static void elementwise(const struct operation *op) {
    for (int64_t i = 0; i < op->sizes[0]; i++)
        for (int64_t j = 0; j < op->sizes[1]; j++)
            for (int64_t k = 0; k < op->sizes[2]; k++) {
                void *start[3];
                for (int part = 0; part < 3; part++) {
                    const int64_t *strides = op->strides[part];
                    int64_t elements = i * strides[0] + j * strides[1] + k * strides[2];
                    start[part] = op->memory[part]
                                      ? moved(op->memory[part], op->types[part], elements)
                                      : 0;
                }
                if (op->kind == MEAN)
                    *(float *)start[0] = mean(start[1], op->sizes[AXES - 1], (int64_t)op->value);
                else if (op->kind == LOOK_UP)
                    look_up(op, start[0], start[1]);
                else
                    along(op, start);
            }
}

static void run(const struct operation *operations, int64_t count, struct team *team) {
    for (const struct operation *op = operations; op < operations + count; op++)
        if (op->kind == CALL)
            op->call(op->argument, team);
        else
            elementwise(op);
}

int omp_get_thread_num(void);

/* `calls` is how many of the operations are calls, which share their work among threads. */
void run_tape(const struct operation *operations, int64_t count, int64_t calls) {
    struct team team = {.threads = omp_get_max_threads()};
    if (!calls || team.threads < 2) {
        run(operations, count, 0);
        return;
    }
#pragma omp parallel num_threads(team.threads)
    if (omp_get_thread_num()) {
        help(&team);
    } else {
        run(operations, count, &team);
        end_run(&team);
    }
}
