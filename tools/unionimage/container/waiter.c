/* What a container's monitor is while nothing happens: it waits, and becomes a monitor again.
 *
 *     unionfuse-waiter DESCRIPTORS COMMAND...
 *
 * The monitor executes this in its own place: process, children, descriptors and the signals that
 * are blocked (SIGCHLD, SIGTERM) stay as they are. As soon as one of the descriptors (commas
 * between them) can be read or has ended, or one of the signals has come, COMMAND is executed, which
 * finds all of that as it is. An interpreter that waits holds some megabytes, this a tenth of one.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

enum { MOST = 16 };

int main(int count, char **words) {
    struct pollfd polled[MOST];
    sigset_t signals;
    nfds_t used = 1;
    if (count < 3) {
        dprintf(2, "unionfuse-waiter: it is started by unionfuse\n");
        return 2;
    }
    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD);
    sigaddset(&signals, SIGTERM);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    polled[0].fd = signalfd(-1, &signals, SFD_CLOEXEC); /* never read: they stay pending */
    for (char *word = strtok(words[1], ","); word && used < MOST; word = strtok(NULL, ","))
        polled[used++].fd = atoi(word);
    for (nfds_t i = 0; i < used; i++)
        polled[i].events = POLLIN;
    while (poll(polled, used, -1) < 0 && errno == EINTR) { /* a signal that is nobody's */ }
    execv(words[2], words + 2);
    dprintf(2, "unionfuse-waiter: %s: %s\n", words[2], strerror(errno));
    return 1;
}
