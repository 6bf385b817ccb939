/*
 * Threads that sleep until a task is to be done, and then do it together with whoever asks.
 *
 * OpenMP's spin before they sleep, which on cores that share their arithmetic slows the thread that
 * launches kernels, and every thread that calls a driver's functions would have a team of its own. Here
 * nobody spins but who waits for the last part of a task. Linux alone.
 */
#include "threads.h"

struct workers {
    void (*work)(void *task); /* does parts of a task until none is left, on many threads at once */
    void *task;               /* null while there is none */
    pthread_mutex_t turn;     /* held by who asks: tasks of several streams are done in turn */
    uint32_t calls;           /* what sleeping threads wait for to change */
    int32_t active;           /* threads that may be at the task */
    int32_t stopping;
    int64_t count;
    pthread_t threads[];
};

static void *serve(void *given) {
    struct workers *w = given;
    for (uint32_t seen = 0;;) {
        uint32_t calls = __atomic_load_n(&w->calls, __ATOMIC_SEQ_CST);
        if (calls == seen) {
            sleep_on(&w->calls, seen, NULL);
            continue;
        }
        seen = calls;
        if (__atomic_load_n(&w->stopping, __ATOMIC_SEQ_CST)) return NULL;
        /* First active, then looked: who asked clears the task first and then waits for `active`. */
        __atomic_add_fetch(&w->active, 1, __ATOMIC_SEQ_CST);
        void *task = __atomic_load_n(&w->task, __ATOMIC_SEQ_CST);
        if (task) w->work(task);
        __atomic_sub_fetch(&w->active, 1, __ATOMIC_SEQ_CST);
    }
}

/* End all threads, and free what they share; no task may be under way. */
static void end_workers(struct workers *w) {
    pthread_mutex_lock(&w->turn); /* a device that failed may have left a task under way */
    __atomic_store_n(&w->stopping, 1, __ATOMIC_SEQ_CST);
    change(&w->calls);
    pthread_mutex_unlock(&w->turn);
    for (int64_t i = 0; i < w->count; i++) pthread_join(w->threads[i], NULL);
    pthread_mutex_destroy(&w->turn);
    free(w);
}

/* Begin `count` threads, or as many as the system grants; null where it grants no memory. */
static struct workers *begin_workers(int64_t count, void (*work)(void *)) {
    struct workers *w = calloc(1, sizeof *w + count * sizeof(pthread_t));
    if (!w) return NULL;
    w->work = work;
    pthread_mutex_init(&w->turn, NULL);
    w->count = begin_threads(w->threads, count, serve, w);
    return w;
}

/* Do a task on this thread and on all workers. */
static void work_together(struct workers *w, void *task) {
    pthread_mutex_lock(&w->turn);
    __atomic_store_n(&w->task, task, __ATOMIC_SEQ_CST);
    change(&w->calls);
    w->work(task);
    __atomic_store_n(&w->task, NULL, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&w->active, __ATOMIC_SEQ_CST)) relax();
    pthread_mutex_unlock(&w->turn);
}
