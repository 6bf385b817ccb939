/*
 * A thread that does a task for each flag that a device raises, and raises another flag in answer.
 *
 * A captured step of a device asks so for the host's attention: a function of the host would cost it
 * five times as much. The thread watches one flag after the other, in the order in which a step raises
 * them. It spins while the next one may come soon, and then naps. It sleeps while no step is expected.
 * Linux alone.
 */
#define _GNU_SOURCE /* for the cores of threads */
#include <sys/prctl.h>

#include "threads.h"

static const int64_t SPIN_NS = 300 * 1000, NAP_NS = 20 * 1000, LONG_NAP_NS = 1000 * 1000;
static const int64_t NAPS_BEFORE_LONG = 50 * 1000; /* a second */

struct server {
    uint64_t *asks, *answers;                    /* `count` flags each */
    void (**entries)(void *argument);            /* of each task */
    void **arguments;
    int64_t count, expected, done; /* flags in all that were announced, and that were answered */
    uint32_t calls;                /* what the sleeping thread waits for to change */
    uint32_t rests;                /* what others wait for to change: nothing is expected any more */
    int32_t stopping;
    pthread_t thread;
};

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int at_rest(const struct server *s) {
    return __atomic_load_n(&s->done, __ATOMIC_SEQ_CST) >=
           __atomic_load_n(&s->expected, __ATOMIC_SEQ_CST);
}

static void nap(int64_t ns) {
    struct timespec time = {0, ns};
    nanosleep(&time, NULL);
}

/* Wait until a flag is up; false where the server is to stop. */
static int await(struct server *s, uint64_t *flag) {
    int64_t start = now_ns(), naps = 0;
    for (int64_t turn = 0; !__atomic_load_n(flag, __ATOMIC_ACQUIRE); turn++) {
        if (__atomic_load_n(&s->stopping, __ATOMIC_ACQUIRE)) return 0;
        if (naps || (turn % 64 == 63 && now_ns() - start > SPIN_NS))
            nap(naps++ < NAPS_BEFORE_LONG ? NAP_NS : LONG_NAP_NS);
        else
            relax();
    }
    return 1;
}

static void *answer_flags(void *given) {
    struct server *s = given;
    prctl(PR_SET_TIMERSLACK, 1000UL); /* or naps take 50 us more */
    for (int64_t at = 0;; at = (at + 1) % s->count) {
        for (;;) {
            uint32_t calls = __atomic_load_n(&s->calls, __ATOMIC_ACQUIRE);
            if (__atomic_load_n(&s->stopping, __ATOMIC_ACQUIRE)) return NULL;
            if (!at_rest(s)) break;
            sleep_on(&s->calls, calls, NULL);
        }
        if (!await(s, &s->asks[at])) return NULL;
        __atomic_store_n(&s->asks[at], 0, __ATOMIC_RELAXED);
        s->entries[at](s->arguments[at]);
        __atomic_store_n(&s->answers[at], 1, __ATOMIC_RELEASE);
        __atomic_add_fetch(&s->done, 1, __ATOMIC_SEQ_CST);
        if (at_rest(s)) change(&s->rests);
    }
}

/* Begin a server of flags that are all down; null where the system grants no thread. */
struct server *begin_server(uint64_t *asks, uint64_t *answers, void (**entries)(void *),
                            void **arguments, int64_t count) {
    struct server *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->asks = asks, s->answers = answers, s->entries = entries, s->arguments = arguments;
    s->count = count;
    if (begin_threads(&s->thread, 1, answer_flags, s)) return s;
    free(s);
    return NULL;
}

/* Announce that all flags will be raised once; whoever calls it has written the tasks. */
void expect_flags(struct server *s) {
    __atomic_add_fetch(&s->expected, s->count, __ATOMIC_SEQ_CST);
    change(&s->calls);
}

/* Sleep until all flags that were announced are answered, or some seconds are over. */
void await_rest(struct server *s, int64_t seconds) {
    struct timespec most = {seconds, 0};
    uint32_t rests = __atomic_load_n(&s->rests, __ATOMIC_SEQ_CST);
    if (!at_rest(s)) sleep_on(&s->rests, rests, &most);
}

/* End the thread, raise all answers, so that nothing waits for one, and free the server. */
void end_server(struct server *s) {
    __atomic_store_n(&s->stopping, 1, __ATOMIC_RELEASE);
    change(&s->calls);
    pthread_join(s->thread, NULL);
    for (int64_t i = 0; i < s->count; i++) __atomic_store_n(&s->answers[i], 1, __ATOMIC_RELEASE);
    free(s);
}
