/* The keeper of one mount: holds what must not end with the daemon, and starts daemons.
 *
 *     unionfuse-keeper SOCKET PID READY CWD LOG MOUNTPOINT KEPT -- COMMAND...
 *
 * It is the daemon's parent, and knows nothing of FUSE or of the union. It holds descriptors that
 * the daemon hands it (the mounted /dev/fuse, the locks, the shared memory, files deleted while
 * open), starts the daemon anew when it dies, passes signals on, and ends the mount when that does
 * not help. It is a program of its own, and not Python, so as to stay small: an interpreter holds
 * some megabytes, this a tenth of one.
 *
 * Messages come over a SOCK_SEQPACKET socket, in the words of sd_notify(3): FDSTORE=1 and
 * FDNAME=NAME with one descriptor, FDSTOREREMOVE=1, READY=1; X_MOUNTPOINT=PATH with
 * X_DEVICE=MAJOR:MINOR of what is mounted there, and X_ENDS=REASON where a crash is to end the
 * mount. A new daemon finds its socket's number in UNIONFUSE_KEEPER, and gets the names and
 * descriptors through it, an empty message last.
 *
 * Where there is a service manager ($NOTIFY_SOCKET) it is told READY, MAINPID and STOPPING, and
 * holds the descriptors as well. What it has for a new keeper comes as KEPT: NAME=NUMBER, commas
 * between.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

enum {
    UPGRADE = 75, /* a daemon that ends with this wants to be replaced (EX_TEMPFAIL) */
    SLEEP = 76, /* and with this when there is a request */
    MOST_SHORT_LIVES = 8, /* in a row, then the mount ends */
    FREE_TRIES = 3, /* short lives before it waits */
    NAME_MOST = 8192,
};
static const double LIFE = 0.2; /* seconds of service; who dies sooner counts as one of many */
static const double LONGEST_WAIT = 5.0;
static const int SIGNALS[] = {SIGCHLD, SIGHUP, SIGINT, SIGUSR1, SIGTERM};

struct kept { char *name; int descriptor; };

static int line = -1; /* to the daemon */
static pid_t daemon_pid;
static int ready; /* who started the mount waits for a byte in it; -1: nobody */
static const char *cwd, *log_path;
static char **command;
static char *mountpoint, *device; /* empty until it is mounted */
static struct kept *kept;
static size_t kept_count;
static const char *manager; /* the service manager's socket, or NULL */
static int messenger = -1;
static int served; /* the mount has answered */
static int ending; /* somebody has asked for the end */
static char *reason; /* why a crash ends the mount, or NULL */
static int short_lives, restarts;
static double serves_since; /* 0: the present daemon does not serve yet */
static int signals; /* a signalfd */
static int calls; /* one without SIGCHLD, never read: the signals stay for the other one */
static sigset_t ours, theirs; /* what is waited for, and what was blocked before */
static sigset_t later; /* what is blocked in a daemon until it has its handlers */

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void *sure(void *memory) {
    if (!memory)
        abort();
    return memory;
}

static void replace(char **text, const char *with) {
    char *copy = sure(strdup(with));
    free(*text);
    *text = copy;
}

/* --- messages --------------------------------------------------------------------------------- */

static ssize_t send_with(int to, const void *text, size_t length, int descriptor,
                         const struct sockaddr_un *address, socklen_t address_length) {
    union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control;
    struct iovec vector = {(void *)text, length};
    struct msghdr message = {.msg_name = (void *)address, .msg_namelen = address_length,
                             .msg_iov = &vector, .msg_iovlen = 1};
    if (descriptor >= 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&control.header), &descriptor, sizeof descriptor);
    }
    return sendmsg(to, &message, MSG_NOSIGNAL);
}

/* Tell the service manager, if there is one. One that does not listen any more is no harm. */
static void __attribute__((format(printf, 2, 3))) tell(int descriptor, const char *format, ...) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char text[2 * NAME_MOST];
    size_t length;
    va_list words;
    if (!manager || strlen(manager) >= sizeof address.sun_path)
        return;
    strcpy(address.sun_path, manager);
    length = offsetof(struct sockaddr_un, sun_path) + strlen(manager);
    if (manager[0] == '@')
        address.sun_path[0] = 0;
    va_start(words, format);
    vsnprintf(text, sizeof text, format, words);
    va_end(words);
    send_with(messenger, text, strlen(text), descriptor, &address, length);
}

static void __attribute__((format(printf, 1, 2))) say(const char *format, ...) {
    char text[NAME_MOST], when[64];
    time_t seconds = time(NULL);
    va_list words;
    int log;
    va_start(words, format);
    vsnprintf(text, sizeof text, format, words);
    va_end(words);
    if (!strcmp(log_path, "-")) {
        dprintf(2, "unionfuse: %s: %s\n", mountpoint, text);
    } else if (*log_path) {
        log = open(log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
        strftime(when, sizeof when, "%Y-%m-%d %H:%M:%S,000", localtime(&seconds));
        dprintf(log, "%s WARNING %s: %s\n", when, mountpoint, text);
        close(log);
    } else {
        openlog("unionfuse", LOG_PID, LOG_DAEMON);
        syslog(LOG_WARNING, "%s: %s", mountpoint, text);
        closelog();
    }
}

/* --- what is kept ----------------------------------------------------------------------------- */

static void drop(const char *name) {
    for (size_t i = 0; i < kept_count; i++)
        if (!strcmp(kept[i].name, name)) {
            tell(-1, "FDSTOREREMOVE=1\nFDNAME=%s", name); /* `name` may be what is freed next */
            close(kept[i].descriptor);
            free(kept[i].name);
            memmove(kept + i, kept + i + 1, (--kept_count - i) * sizeof *kept);
            return;
        }
}

static void keep(const char *name, int descriptor) {
    kept = sure(realloc(kept, (kept_count + 1) * sizeof *kept));
    kept[kept_count].name = sure(strdup(name));
    kept[kept_count++].descriptor = descriptor;
}

/* What a service manager had: NAME=NUMBER, commas between. */
static void keep_all(char *words) {
    for (char *word = strtok(words, ","); word; word = strtok(NULL, ",")) {
        char *number = strchr(word, '=');
        if (!number)
            continue;
        *number++ = 0;
        keep(word, atoi(number));
        fcntl(atoi(number), F_SETFD, FD_CLOEXEC);
    }
}

/* The device of the topmost mount on a path, as /proc has it; empty for none. */
static void mounted_on(const char *path, char *found, size_t size) {
    char *escaped = sure(malloc(4 * strlen(path) + 1)), *end = escaped, *text = NULL;
    size_t room = 0;
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    for (; *path; path++)
        end += strchr("\\ \t\n", *path) ? sprintf(end, "\\%03o", *path) : (*end = *path, 1);
    *end = 0;
    *found = 0;
    while (mounts && getline(&text, &room, mounts) > 0) {
        char *words[5], *rest = text;
        for (int i = 0; i < 5; i++)
            words[i] = strsep(&rest, " ");
        if (words[4] && !strcmp(words[4], escaped))
            snprintf(found, size, "%s", words[2]);
    }
    if (mounts)
        fclose(mounts);
    free(text);
    free(escaped);
}

/* --- one daemon ------------------------------------------------------------------------------- */

/* The mount is being served: who waits for it may go on. */
static void answers(void) {
    int nowhere;
    served = 1;
    serves_since = now();
    tell(-1, "READY=1\nMAINPID=%d\nSTATUS=serving %s", getpid(), mountpoint);
    if (ready < 0)
        return;
    if (write(ready, "\n", 1) < 0 && errno == EPIPE) {
        ending = 1;
        kill(daemon_pid, SIGTERM);
    }
    close(ready);
    ready = -1;
    nowhere = open("/dev/null", O_RDWR | O_CLOEXEC);
    dup2(nowhere, 1);
    dup2(nowhere, 2);
    close(nowhere);
}

static void obey(char *text, int descriptor) {
    const char *name = "";
    int stores = 0, removes = 0, is_ready = 0;
    for (char *word = strsep(&text, "\n"); word; word = strsep(&text, "\n")) {
        char *value = strchr(word, '=');
        if (!value)
            continue;
        *value++ = 0;
        if (!strcmp(word, "FDNAME"))
            name = value;
        else if (!strcmp(word, "X_MOUNTPOINT"))
            replace(&mountpoint, value);
        else if (!strcmp(word, "X_DEVICE"))
            replace(&device, value);
        else if (!strcmp(word, "X_ENDS"))
            replace(&reason, value);
        stores |= !strcmp(word, "FDSTORE");
        removes |= !strcmp(word, "FDSTOREREMOVE");
        is_ready |= !strcmp(word, "READY");
    }
    if (stores && descriptor >= 0) {
        drop(name);
        keep(name, descriptor);
        tell(descriptor, "FDSTORE=1\nFDNAME=%s", name);
    } else if (removes) {
        drop(name);
    }
    if (is_ready)
        answers();
}

/* Take one message; 0 when there is none, or will be none any more. */
static int receive(int flags) {
    union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control;
    char text[NAME_MOST + 1];
    struct iovec vector = {text, NAME_MOST};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof control};
    ssize_t length = recvmsg(line, &message, flags | MSG_CMSG_CLOEXEC);
    struct cmsghdr *header = length >= 0 ? CMSG_FIRSTHDR(&message) : NULL;
    int descriptor = -1;
    if (header && header->cmsg_type == SCM_RIGHTS)
        memcpy(&descriptor, CMSG_DATA(header), sizeof descriptor);
    if (length < 0 && errno == EINTR)
        return 1;
    if (length <= 0)
        return 0;
    text[length] = 0;
    obey(text, descriptor);
    return 1;
}

/* A signal that has come; 0 when there is none. */
static int next_signal(void) {
    struct signalfd_siginfo signal;
    return read(signals, &signal, sizeof signal) == sizeof signal ? (int)signal.ssi_signo : 0;
}

static void pass_on(void) {
    int number;
    while ((number = next_signal())) {
        if (number == SIGINT || number == SIGTERM) {
            ending = 1;
            tell(-1, "STOPPING=1");
        }
        if (number != SIGCHLD)
            kill(daemon_pid, number);
    }
}

/* Serve a daemon until it has ended; returns its wait status. */
static int watch(void) {
    struct pollfd polled[] = {{.fd = signals, .events = POLLIN}, {.fd = line, .events = POLLIN}};
    int status;
    for (;;) {
        if (poll(polled, 2, -1) < 0)
            continue; /* what is in `revents` is old */
        if (polled[0].revents)
            pass_on();
        if (polled[1].revents && !receive(MSG_DONTWAIT))
            polled[1].fd = -1;
        if (waitpid(daemon_pid, &status, WNOHANG) > 0) {
            while (polled[1].fd >= 0 && receive(MSG_DONTWAIT)) { /* what it said at last */ }
            close(line);
            return status;
        }
    }
}

/* --- the next one ----------------------------------------------------------------------------- */

static void become_daemon(int its_line) {
    char number[16];
    snprintf(number, sizeof number, "%d", its_line);
    fcntl(its_line, F_SETFD, 0);
    unsetenv("UNIONFUSE_TEST_KILL_AT"); /* that was for the one before */
    setenv("UNIONFUSE_KEEPER", number, 1);
    setenv("UNIONFUSE_CWD", cwd, 1);
    signal(SIGPIPE, SIG_DFL);
    sigprocmask(SIG_SETMASK, &later, NULL);
    execv(command[0], command);
    _exit(1);
}

static void start(void) {
    int ends[2];
    serves_since = 0;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
        abort();
    daemon_pid = fork();
    if (daemon_pid == 0)
        become_daemon(ends[1]);
    close(ends[1]);
    line = ends[0];
    /* One that has died already: the next one gets them again. */
    for (size_t i = 0; i < kept_count; i++)
        if (send_with(line, kept[i].name, strlen(kept[i].name), kept[i].descriptor, NULL, 0) < 0)
            return;
    send_with(line, ".", 1, -1, NULL, 0);
}

static void wait_for(double seconds) {
    double end = now() + seconds, left;
    struct pollfd polled = {.fd = signals, .events = POLLIN};
    int number;
    while (!ending && (left = end - now()) > 0)
        if (poll(&polled, 1, (int)(left * 1000) + 1) > 0)
            while ((number = next_signal()))
                ending |= number == SIGTERM || number == SIGINT;
}

/* Wait until something is asked of a mount that nobody serves, or a signal comes, or it has ended.
 * Code 7 is FUSE_NOTIFY_RESEND: what the daemon had read and not answered can be read again. */
static void sleep_until_asked(void) {
    const struct { uint32_t length; int32_t code; uint64_t unique; } resend = {16, 7, 0};
    struct pollfd polled[] = {{.fd = calls, .events = POLLIN}, {.fd = -1, .events = POLLIN}};
    for (size_t i = 0; i < kept_count; i++)
        if (!strcmp(kept[i].name, "fuse"))
            polled[1].fd = kept[i].descriptor;
    if (write(polled[1].fd, &resend, sizeof resend) < 0)
        return;
    for (;;) {
        poll(polled, 2, -1);
        if (polled[0].revents || polled[1].revents)
            return;
    }
}

/* Start a new daemon; 0 when that has been tried often enough. */
static int replace_daemon(int status) {
    double lived = serves_since ? now() - serves_since : 0;
    int sleeps = WIFEXITED(status) && WEXITSTATUS(status) == SLEEP;
    int upgrade = sleeps || (WIFEXITED(status) && WEXITSTATUS(status) == UPGRADE);
    short_lives = lived < LIFE && !upgrade ? short_lives + 1 : 0;
    if (short_lives >= MOST_SHORT_LIVES)
        return 0;
    if (short_lives > FREE_TRIES) {
        double seconds = 0.1 * (1 << (short_lives - FREE_TRIES));
        wait_for(seconds < LONGEST_WAIT ? seconds : LONGEST_WAIT);
    }
    if (ending)
        return 0;
    if (sleeps)
        sleep_until_asked();
    restarts += !sleeps;
    if (!upgrade && WIFSIGNALED(status))
        say("the daemon was killed by signal %d; replacement %d takes over", WTERMSIG(status),
            restarts);
    else if (!upgrade)
        say("the daemon ended with code %d; replacement %d takes over", WEXITSTATUS(status),
            restarts);
    start();
    return 1;
}

/* --- the end ---------------------------------------------------------------------------------- */

static void unmount_by_program(void) {
    pid_t child = fork();
    if (child == 0) {
        sigprocmask(SIG_SETMASK, &theirs, NULL);
        execlp("fusermount3", "fusermount3", "-u", "-z", "--", mountpoint, NULL);
        _exit(1); /* it stays, and says that its endpoint is not connected */
    }
    waitpid(child, NULL, 0);
}

/* Take the mount away: nobody will serve it. Whoever waits for an answer gets an error. */
static int end(const char *why) {
    char there[64];
    say("the daemon %s; the mount ends", why);
    mounted_on(mountpoint, there, sizeof there);
    if (strcmp(there, device))
        return 1; /* what is there now is somebody else's */
    if (umount2(mountpoint, MNT_DETACH | UMOUNT_NOFOLLOW))
        unmount_by_program();
    return 1;
}

static int until_the_end(void) {
    char why[NAME_MOST];
    for (;;) {
        int status = watch();
        int code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
        if (code == 0 || (ending && code == 1))
            return code;
        if (!*mountpoint)
            return code > 0 ? code : 1;
        if (!served && code > 0) /* killed it may be at any time */
            return end("gave up before it served");
        if (ending)
            return end("died while it was ending");
        if (reason) {
            snprintf(why, sizeof why, "died, and cannot be replaced: %s", reason);
            return end(why);
        }
        if (!replace_daemon(status)) {
            snprintf(why, sizeof why, "died %d times in a row", short_lives);
            return end(why);
        }
    }
}

static void take_signals(void) {
    sigemptyset(&ours);
    for (size_t i = 0; i < sizeof SIGNALS / sizeof *SIGNALS; i++) {
        signal(SIGNALS[i], SIG_DFL);
        sigaddset(&ours, SIGNALS[i]);
    }
    signal(SIGPIPE, SIG_IGN);
    sigprocmask(SIG_BLOCK, &ours, &theirs); /* who starts a keeper has done it already */
    for (size_t i = 0; i < sizeof SIGNALS / sizeof *SIGNALS; i++)
        sigdelset(&theirs, SIGNALS[i]);
    sigorset(&later, &theirs, &ours);
    sigdelset(&later, SIGCHLD);
    signals = signalfd(-1, &ours, SFD_CLOEXEC | SFD_NONBLOCK);
    sigdelset(&ours, SIGCHLD);
    calls = signalfd(-1, &ours, SFD_CLOEXEC);
}

int main(int count, char **words) {
    char there[64];
    int code;
    if (count < 10) {
        dprintf(2, "unionfuse-keeper: it is started by unionfuse\n");
        return 2;
    }
    line = atoi(words[1]);
    daemon_pid = atoi(words[2]);
    ready = atoi(words[3]);
    cwd = words[4];
    log_path = words[5];
    replace(&mountpoint, words[6]);
    keep_all(words[7]);
    command = words + 9;
    fcntl(line, F_SETFD, FD_CLOEXEC);
    if (ready >= 0)
        fcntl(ready, F_SETFD, FD_CLOEXEC);
    if (chdir("/"))
        return 1;
    manager = getenv("NOTIFY_SOCKET");
    messenger = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    mounted_on(mountpoint, there, sizeof there);
    replace(&device, there);
    take_signals();
    code = until_the_end();
    tell(-1, "STOPPING=1");
    while (kept_count)
        drop(kept[0].name);
    return code;
}
