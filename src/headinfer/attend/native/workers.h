/*
 * Threads that sleep until a task is to be done, and then do it together with whoever asks.
 *
 * OpenMP's spin before they sleep, which on cores that share their arithmetic slows the thread that
 * launches kernels, and every thread that calls a driver's functions would have a team of its own. Here
 * nobody spins but who waits for the last part of a task. Linux alone.
 */
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

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

static void relax(void) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

static void wake_all(struct workers *w) {
    __atomic_add_fetch(&w->calls, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &w->calls, FUTEX_WAKE_PRIVATE, w->count, NULL, NULL, 0);
}

static void *serve(void *given) {
    struct workers *w = given;
    for (uint32_t seen = 0;;) {
        uint32_t calls = __atomic_load_n(&w->calls, __ATOMIC_SEQ_CST);
        if (calls == seen) {
            syscall(SYS_futex, &w->calls, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
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
    wake_all(w);
    pthread_mutex_unlock(&w->turn);
    for (int64_t i = 0; i < w->count; i++) pthread_join(w->threads[i], NULL);
    pthread_mutex_destroy(&w->turn);
    free(w);
}

int omp_get_num_places(void);
int omp_get_place_num_procs(int place);
void omp_get_place_proc_ids(int place, int *ids);

/* Let threads run wherever OpenMP's may: where it binds them, whoever asks is bound to one core. */
static void set_places(pthread_attr_t *attributes) {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    for (int place = 0; place < omp_get_num_places(); place++) {
        int ids[CPU_SETSIZE], count = omp_get_place_num_procs(place);
        if (count > CPU_SETSIZE) return;
        omp_get_place_proc_ids(place, ids);
        for (int i = 0; i < count; i++)
            if (ids[i] < CPU_SETSIZE) CPU_SET(ids[i], &cpus);
    }
    if (CPU_COUNT(&cpus)) pthread_attr_setaffinity_np(attributes, sizeof cpus, &cpus);
}

/* Begin `count` threads, or as many as the system grants; null where it grants no memory. */
static struct workers *begin_workers(int64_t count, void (*work)(void *)) {
    struct workers *w = calloc(1, sizeof *w + count * sizeof(pthread_t));
    if (!w) return NULL;
    w->work = work;
    pthread_mutex_init(&w->turn, NULL);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    set_places(&attributes);
    sigset_t all, before; /* signals are for the threads that were there before */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (w->count < count && !pthread_create(&w->threads[w->count], &attributes, serve, w))
        w->count++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return w;
}

/* Do a task on this thread and on all workers. */
static void work_together(struct workers *w, void *task) {
    pthread_mutex_lock(&w->turn);
    __atomic_store_n(&w->task, task, __ATOMIC_SEQ_CST);
    wake_all(w);
    w->work(task);
    __atomic_store_n(&w->task, NULL, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&w->active, __ATOMIC_SEQ_CST)) relax();
    pthread_mutex_unlock(&w->turn);
}
