/*
 * Threads of our own: beginning them, and sleeping until somebody changes a word. Linux alone.
 *
 * The source that includes it first defines _GNU_SOURCE, for the cores of threads.
 */
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void relax(void) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

/* Sleep while a word has a value, or until somebody wakes the sleeper, or time is over. */
static void sleep_on(uint32_t *word, uint32_t value, const struct timespec *most) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, most, NULL, 0);
}

/* Change a word, and wake all who sleep on it. */
static void change(uint32_t *word) {
    __atomic_add_fetch(word, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
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

/* Begin `count` threads, or as many as the system grants; return how many. */
static int64_t begin_threads(pthread_t *threads, int64_t count, void *(*run)(void *), void *given) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    set_places(&attributes);
    sigset_t all, before; /* signals are for the threads that were there before */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int64_t begun = 0;
    while (begun < count && !pthread_create(&threads[begun], &attributes, run, given)) begun++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return begun;
}
