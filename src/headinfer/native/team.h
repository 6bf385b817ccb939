/*
 * A team: threads of OpenMP that stay awake for a run of many small tasks, which all of them share.
 *
 * Threads that are told not to spin sleep between two of OpenMP's regions. Waking one takes as long as
 * a small product: in a decode step of SmolLM2-135M on two cores that was 8 of 21 ms. So a run is one
 * region. One thread leads it, and the others look for tasks until it is over.
 */
#pragma once
#include <sched.h>
#include <stdint.h>

#define SPINS 1000 /* looks, until other programs may have the core between two of them */

struct task {
    void (*work)(void *given); /* does parts until none is left, on many threads at once */
    void *given;
};

struct team {
    const struct task *task; /* null while there is none */
    uint32_t calls;          /* what waiting threads look at */
    int32_t active;          /* threads that may be at the task */
    int32_t over;
    int threads; /* of OpenMP's; it may have granted fewer */
};

static inline void look_again(int *looks) {
    if (++*looks > SPINS)
        sched_yield();
#ifdef __x86_64__
    else
        __builtin_ia32_pause();
#endif
}

/* Do a team's tasks with the leader, until the run is over. */
static inline void help(struct team *team) {
    int looks = 0;
    for (uint32_t seen = 0; !__atomic_load_n(&team->over, __ATOMIC_SEQ_CST);) {
        uint32_t calls = __atomic_load_n(&team->calls, __ATOMIC_SEQ_CST);
        if (calls == seen) {
            look_again(&looks);
            continue;
        }
        seen = calls, looks = 0;
        /* First active, then looked: the leader clears the task first and then waits for `active`. */
        __atomic_add_fetch(&team->active, 1, __ATOMIC_SEQ_CST);
        const struct task *task = __atomic_load_n(&team->task, __ATOMIC_SEQ_CST);
        if (task) task->work(task->given);
        __atomic_sub_fetch(&team->active, 1, __ATOMIC_SEQ_CST);
    }
}

static inline void end_run(struct team *team) {
    __atomic_store_n(&team->over, 1, __ATOMIC_SEQ_CST);
}

/* Do a task on `threads` threads: those of the team whose leader this is, or new ones without it. */
static inline void share(struct team *team, int threads, void (*work)(void *), void *given) {
    if (threads < 2) {
        work(given);
        return;
    }
    if (!team) {
#pragma omp parallel num_threads(threads)
        work(given);
        return;
    }
    struct task task = {work, given};
    __atomic_store_n(&team->task, &task, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&team->calls, 1, __ATOMIC_SEQ_CST);
    work(given);
    __atomic_store_n(&team->task, (const struct task *)0, __ATOMIC_SEQ_CST);
    for (int looks = 0; __atomic_load_n(&team->active, __ATOMIC_SEQ_CST);) look_again(&looks);
}

int omp_get_max_threads(void); /* torch's: native/threads.py */

/* How many threads share a task of a team, or of none. */
static inline int threads_of(const struct team *team) {
    return team ? team->threads : omp_get_max_threads();
}
