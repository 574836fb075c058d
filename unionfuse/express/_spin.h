/* Whose turn it is to read /dev/fuse, and whether to look for a request before sleeping for one.
 * For _lane.pyx alone.
 *
 * To wake a sleeping thread on another processor costs more than to answer a request. So while
 * requests come fast one reader *looks* for the next one for a moment before it sleeps, and the
 * others stand aside: the kernel would wake one that sleeps in read(2), though nobody needs it.
 * They come in when the one that reads goes to Python, when it is busy for long, and when no more
 * requests come.
 *
 * Whether looking pays nobody can know: on a busy machine it takes the processor from those who
 * ask. So it is tried: a few stretches of requests each way, then the better way for many, then
 * the next trial. Where somebody else wants the reader's processor, looking loses: who does not
 * sleep is made to wait later, for longer than a stretch can show. A mount that is asked little
 * never looks; an idle one sleeps.
 */
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SPIN_WINDOW 30000    /* ns to look before sleeping */
#define SPIN_STRETCH 32      /* requests that are timed together */
#define SPIN_SETTLE 4        /* at the start of a stretch, not timed: the others come or go */
#define SPIN_PAIRS 4         /* of stretches in a trial, one without and one with looking */
#define SPIN_WINS 3          /* of them, where looking has to gain enough to be chosen */
#define SPIN_GAIN 90         /* per cent of the time without looking that is enough */
#define SPIN_LASTS 256       /* stretches from a trial that looking won to the next */
#define SPIN_LEAST 64        /* from one that it lost: twice as many each time, from so many ... */
#define SPIN_MOST 1024       /* ... to so many */
#define SPIN_CAP 1000000     /* ns between two requests; more counts as so much */
#define SPIN_PAUSE 5000000   /* ns without a request that end looking and all trials */
#define SPIN_WATCH 2000000   /* ns after which those who stand aside see to it that somebody reads */

#define SPIN_ALWAYS 2

struct spin {
    int enabled; /* 0: no; 1: while it pays; SPIN_ALWAYS: while requests come */
    int looks;   /* whether the next reader looks; changed by who holds `judging` */
    int inside;  /* readers that look, or sleep in read(2) */
    int aside;   /* readers that stand aside */
    int gate;    /* a futex: another number each time that they may come in */
    int judging; /* taken by who changes what follows */
    int64_t last;    /* when a request came */
    int64_t stretch; /* ns of this stretch */
    int64_t plain;   /* of the one before, without looking */
    int64_t usual;   /* of all of those in a trial */
    int count;  /* requests of this stretch */
    int missed; /* of those, how many came when nobody looked any more */
    int number; /* of this stretch since the trial began */
    int wins;   /* pairs that looking won */
    int slow;   /* stretches of late that took longer than is usual without looking */
    int lasts;  /* stretches until the next trial; 0: in one */
    int won;    /* looking did, in the last one */
    int rests;  /* those after looking lost for the last time */
    uint64_t found; /* requests that were there before the reader slept */
};

static int64_t spin_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* How often this thread was taken off its processor. */
static long spin_preempted(void) {
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) ? 0 : usage.ru_nivcsw;
}
static __thread long spin_before = -1; /* the same at the start of this stretch */

static int spin_processors(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
}

/* Let those come in that stand aside: before something that may take long. */
static void spin_open(struct spin *s) {
    __atomic_add_fetch(&s->gate, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&s->aside, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &s->gate, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
}

static void spin_set(struct spin *s, int looks) {
    if (looks && spin_processors() < 2) looks = 0;
    if (looks == s->looks) return;
    __atomic_store_n(&s->looks, looks, __ATOMIC_SEQ_CST);
    if (!looks) spin_open(s);
}

static void spin_begin_trial(struct spin *s) {
    s->number = s->wins = s->slow = s->lasts = 0;
    s->usual = 0;
    spin_set(s, 0);
}

static void spin_end_trial(struct spin *s, int looks) {
    if (!looks) s->rests = s->rests ? s->rests < SPIN_MOST ? 2 * s->rests : SPIN_MOST : SPIN_LEAST;
    s->won = looks;
    s->lasts = looks ? SPIN_LASTS : s->rests;
    spin_set(s, looks);
}

static void spin_try(struct spin *s, int disturbed) {
    if (s->number & 1) {
        s->wins += !disturbed && s->stretch < s->plain / 100 * SPIN_GAIN;
    } else {
        s->plain = s->stretch;
        s->usual += s->stretch / SPIN_PAIRS;
    }
    if (++s->number < 2 * SPIN_PAIRS)
        spin_set(s, s->number & 1);
    else
        spin_end_trial(s, s->wins >= SPIN_WINS);
}

/* A stretch is over: what the next one does. */
static void spin_next(struct spin *s) {
    int preempted = spin_before >= 0 && spin_preempted() != spin_before;
    int vain = !s->looks || s->missed > SPIN_STRETCH / 4;
    spin_before = -1;
    if (!s->lasts) {
        spin_try(s, vain || preempted);
        return;
    }
    if (s->looks) s->slow += preempted ? 2 : vain || s->stretch > s->usual ? 1 : s->slow ? -1 : 0;
    if (s->slow > SPIN_PAIRS) {
        s->slow = 0;
        spin_end_trial(s, 0);
    } else if (!--s->lasts) {
        if (s->won) s->rests = 0;
        spin_begin_trial(s);
    }
}

/* A request has come. */
static void spin_judge(struct spin *s, int late) {
    int64_t now = spin_clock(), since;
    if (__atomic_exchange_n(&s->judging, 1, __ATOMIC_ACQUIRE)) return;
    since = now - s->last;
    s->last = now;
    if (s->enabled == SPIN_ALWAYS) {
        spin_set(s, 1);
    } else if (since > SPIN_PAUSE) {
        if (!s->lasts || s->won) spin_begin_trial(s);
        s->count = SPIN_STRETCH;
    } else {
        s->missed += late;
        if (s->count == SPIN_SETTLE) spin_before = s->looks ? spin_preempted() : -1;
        if (++s->count > SPIN_SETTLE) s->stretch += since < SPIN_CAP ? since : SPIN_CAP;
        if (s->count == SPIN_STRETCH) spin_next(s);
    }
    if (s->count == SPIN_STRETCH) {
        s->count = s->missed = 0;
        s->stretch = 0;
    }
    __atomic_store_n(&s->judging, 0, __ATOMIC_RELEASE);
}

/* Wait until there is something to do for one who stands aside, but not for long. */
static void spin_stand_aside(struct spin *s, int gate) {
    struct timespec time = {0, SPIN_WATCH};
    __atomic_add_fetch(&s->aside, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &s->gate, FUTEX_WAIT_PRIVATE, gate, &time, 0, 0);
    __atomic_add_fetch(&s->aside, -1, __ATOMIC_SEQ_CST);
    if (spin_clock() - __atomic_load_n(&s->last, __ATOMIC_RELAXED) > SPIN_PAUSE) spin_set(s, 0);
}

/* Whether the next one to read, the caller, looks first. Only one at a time does. */
static int spin_come_in(struct spin *s) {
    for (;;) {
        int none = 0, gate = __atomic_load_n(&s->gate, __ATOMIC_SEQ_CST);
        if (!__atomic_load_n(&s->looks, __ATOMIC_SEQ_CST)) {
            __atomic_add_fetch(&s->inside, 1, __ATOMIC_SEQ_CST);
            return 0;
        }
        if (__atomic_compare_exchange_n(&s->inside, &none, 1, 0, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
            return 1;
        spin_stand_aside(s, gate);
    }
}

/* Look for a moment; whether a request is there. */
static int spin_look(int fd) {
    struct pollfd wanted = {fd, POLLIN, 0};
    int64_t end = spin_clock() + SPIN_WINDOW;
    do {
        if (poll(&wanted, 1, 0)) return 1; /* or an error, that read(2) tells */
    } while (spin_clock() < end);
    return 0;
}

/* read(2), in turn. */
static ssize_t spin_read(struct spin *s, int fd, void *buffer, size_t size) {
    int looks, found = 0, failure;
    ssize_t got;
    if (!s->enabled) return read(fd, buffer, size);
    looks = spin_come_in(s);
    if (looks) found = spin_look(fd);
    got = read(fd, buffer, size);
    failure = errno;
    __atomic_add_fetch(&s->inside, -1, __ATOMIC_SEQ_CST);
    if (got < 0)
        spin_open(s); /* the others meet with the same */
    else
        spin_judge(s, looks && !found);
    if (found) s->found++;
    errno = failure;
    return got;
}
