"""The keeper of one mount: holds what must not end with the daemon, and starts daemons.

    python -I -S keeper.py SOCKET PID READY CWD LOG MOUNTPOINT KEPT -- COMMAND…

It is the daemon's parent, and knows nothing of FUSE or of the union. It holds descriptors that the
daemon hands it (the mounted /dev/fuse, the locks, the shared memory, files deleted while open),
starts the daemon anew when it dies, passes signals on, and ends the mount when that does not help.
It is a program of its own and imports only what is compiled into Python, so as to stay small.

Messages come over a SOCK_SEQPACKET socket, in the words of sd_notify(3): FDSTORE=1 and FDNAME=NAME
with one descriptor, FDSTOREREMOVE=1, READY=1; X_MOUNTPOINT=PATH with X_DEVICE=MAJOR:MINOR of what
is mounted there, and X_ENDS=REASON where a crash is to end the mount. A new daemon finds its
socket's number in UNIONFUSE_KEEPER, and gets the names and descriptors through it, an empty message
last.

Where there is a service manager ($NOTIFY_SOCKET) it is told READY, MAINPID and STOPPING, and holds
the descriptors as well. What it has for a new keeper comes as KEPT: NAME=NUMBER, commas between.
"""

import _signal as signal  # type: ignore[import-not-found]
import _socket as socket
import posix
import select
import sys
import time

UPGRADE = 75  # a daemon that ends with this wants to be replaced (EX_TEMPFAIL)
_SIGCHLD, _SIGHUP, _SIGINT, _SIGUSR1, _SIGTERM, _SIGPIPE = 17, 1, 2, 10, 15, 13
SIGNALS = (_SIGCHLD, _SIGHUP, _SIGINT, _SIGUSR1, _SIGTERM)  # blocked by who starts a keeper
_LIFE = 0.2  # seconds of service; who dies sooner counts as one of many
_MOST_SHORT_LIVES = 8  # in a row, then the mount ends
_FREE_TRIES = 3  # short lives before it waits
_LONGEST_WAIT = 5.0
_NAME_MAX = 8192
_CLOSE_ON_EXEC = 0x40000000  # MSG_CMSG_CLOEXEC


class Keeper:
    """One mount's."""

    def __init__(
        self,
        ours: int,
        pid: int,
        ready: int,
        cwd: bytes,
        log: bytes,
        mountpoint: bytes,
        kept: bytes,
        command: list[bytes],
    ) -> None:
        self.socket = socket.socket(fileno=ours)
        self.pid = pid
        self.ready = ready  # who started the mount waits for a byte in it
        self.cwd, self.log, self.command = cwd, log, command
        self.mountpoint = mountpoint
        self.device = mounted_on(mountpoint)
        self.kept: dict[bytes, int] = {}  # name -> descriptor
        for name, _, text in [word.partition(b"=") for word in kept.split(b",") if word]:
            self.kept[name] = int(text)
            posix.set_inheritable(int(text), False)
        self.manager = posix.environ.get(b"NOTIFY_SOCKET", b"")
        self.messenger = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.served = False  # the mount has answered
        self.ending = False  # somebody has asked for the end
        self.reason = b""  # why a crash ends the mount
        self.short_lives = 0
        self.restarts = 0
        self.serves_since = 0.0  # 0: the present daemon does not serve yet
        self.wake, waker = posix.pipe()
        for end in (self.wake, waker):
            posix.set_blocking(end, False)
        signal.set_wakeup_fd(waker)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.signal(_SIGPIPE, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def run(self) -> int:
        """Keep until the mount has ended; returns an exit code."""
        code = self.until_the_end()
        self.tell(b"STOPPING=1")
        for name in list(self.kept):
            self.drop(name)
        return code

    def until_the_end(self) -> int:
        while True:
            status = self.watch()
            code = posix.waitstatus_to_exitcode(status)
            if code == 0 or (self.ending and code == 1):
                return code
            if not self.mountpoint:
                return code if code > 0 else 1
            if not self.served and code > 0:  # killed it may be at any time
                return self.end("gave up before it served")
            if self.ending:
                return self.end("died while it was ending")
            if self.reason:
                return self.end("died, and cannot be replaced: " + self.reason.decode())
            if not self.replace(code):
                return self.end(f"died {self.short_lives} times in a row")

    # --- one daemon ---------------------------------------------------------------------------

    def watch(self) -> int:
        """Serve a daemon until it has ended; returns its wait status."""
        poll = select.poll()
        poll.register(self.wake, select.POLLIN)
        poll.register(self.socket.fileno(), select.POLLIN)
        listening = True
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self.wake:
                    self.pass_on(posix.read(self.wake, 512))
                elif listening and not self.receive(0):
                    poll.unregister(self.socket.fileno())
                    listening = False
            pid, status = posix.waitpid(self.pid, posix.WNOHANG)
            if pid:
                while listening and self.receive(0x40):  # MSG_DONTWAIT: what it said at last
                    pass
                self.socket.close()
                return status

    def pass_on(self, signals: bytes) -> None:
        for number in signals:
            if number in (_SIGINT, _SIGTERM):
                self.ending = True
                self.tell(b"STOPPING=1")
            if number != _SIGCHLD:
                try:
                    posix.kill(self.pid, number)
                except ProcessLookupError:
                    pass

    def receive(self, flags: int) -> bool:
        """Take one message; False when there is none, or will be none any more."""
        try:
            data, ancillary, _, _ = self.socket.recvmsg(_NAME_MAX, 64, flags | _CLOSE_ON_EXEC)
        except (BlockingIOError, ConnectionError):
            return False
        descriptor = -1
        for _, _, numbers in ancillary:
            descriptor = int.from_bytes(numbers[:4], sys.byteorder)
        if data:
            self.obey(data, descriptor)
        return bool(data)

    def obey(self, data: bytes, descriptor: int) -> None:
        words = dict(line.partition(b"=")[::2] for line in data.split(b"\n"))
        name = words.get(b"FDNAME", b"")
        if b"FDSTORE" in words and descriptor >= 0:
            self.drop(name)
            self.kept[name] = descriptor
            self.tell(b"FDSTORE=1\nFDNAME=" + name, descriptor)
        elif b"FDSTOREREMOVE" in words:
            self.drop(name)
        if b"X_MOUNTPOINT" in words:
            self.mountpoint = words[b"X_MOUNTPOINT"]
            self.device = words.get(b"X_DEVICE", b"")
        if b"X_ENDS" in words:
            self.reason = words[b"X_ENDS"]
        if b"READY" in words:
            self.answers()

    def drop(self, name: bytes) -> None:
        if name in self.kept:
            posix.close(self.kept.pop(name))
            self.tell(b"FDSTOREREMOVE=1\nFDNAME=" + name)

    def tell(self, message: bytes, descriptor: int = -1) -> None:
        """Tell the service manager, if there is one."""
        if not self.manager:
            return
        where = b"\0" + self.manager[1:] if self.manager[:1] == b"@" else self.manager
        rights = []
        if descriptor >= 0:
            number = descriptor.to_bytes(4, sys.byteorder)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, number)]
        try:
            self.messenger.sendmsg([message], rights, 0, where)
        except OSError:
            pass  # it does not listen any more: the mount goes on without

    def answers(self) -> None:
        """The mount is being served: who waits for it may go on."""
        self.served = True
        self.serves_since = time.monotonic()
        self.tell(b"READY=1\nMAINPID=%d\nSTATUS=serving %s" % (posix.getpid(), self.mountpoint))
        if self.ready < 0:
            return
        try:
            posix.write(self.ready, b"\n")
        except BrokenPipeError:
            self.ending = True
            posix.kill(self.pid, _SIGTERM)
        posix.close(self.ready)
        self.ready = -1
        nowhere = posix.open("/dev/null", posix.O_RDWR)
        for number in (1, 2):
            posix.dup2(nowhere, number)
        posix.close(nowhere)

    # --- the next one -------------------------------------------------------------------------

    def replace(self, code: int) -> bool:
        """Start a new daemon; False when that has been tried often enough."""
        lived = time.monotonic() - self.serves_since if self.serves_since else 0.0
        upgrade = code == UPGRADE
        self.short_lives = self.short_lives + 1 if lived < _LIFE and not upgrade else 0
        if self.short_lives >= _MOST_SHORT_LIVES:
            return False
        if self.short_lives > _FREE_TRIES:
            self.wait(min(_LONGEST_WAIT, 0.1 * 2 ** (self.short_lives - _FREE_TRIES)))
        if self.ending:
            return False
        self.restarts += 1
        if not upgrade:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            self.say(f"the daemon {how}; replacement {self.restarts} takes over")
        self.start()
        return True

    def wait(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self.wake, select.POLLIN)
        end = time.monotonic() + seconds
        while not self.ending and (left := end - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                signals = posix.read(self.wake, 512)
                self.ending = _SIGTERM in signals or _SIGINT in signals

    def start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.serves_since = 0.0
        self.pid = posix.fork()
        if self.pid == 0:
            try:
                ours.close()
                posix.set_inheritable(theirs.fileno(), True)
                environment = dict(posix.environ)
                environment.pop(b"UNIONFUSE_TEST_KILL_AT", None)  # that was for the one before
                environment[b"UNIONFUSE_KEEPER"] = b"%d" % theirs.fileno()
                environment[b"UNIONFUSE_CWD"] = self.cwd
                for number in (*SIGNALS, _SIGPIPE):
                    signal.signal(number, signal.SIG_DFL)
                posix.execve(self.command[0], self.command, environment)
            finally:
                posix._exit(1)
        theirs.close()
        self.socket = ours
        try:
            for name, descriptor in self.kept.items():
                rights = descriptor.to_bytes(4, sys.byteorder)
                ours.sendmsg([name], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            ours.send(b".")
        except ConnectionError:
            pass  # it has died already: the next one gets them again

    # --- the end ------------------------------------------------------------------------------

    def end(self, reason: str) -> int:
        """Take the mount away: nobody will serve it."""
        self.say(f"the daemon {reason}; the mount ends")
        if mounted_on(self.mountpoint) != self.device:
            return 1  # what is there now is somebody else's
        import ctypes  # only now: it is big

        if ctypes.CDLL(None).umount2(self.mountpoint, 2 | 8):  # MNT_DETACH, UMOUNT_NOFOLLOW
            words = [b"fusermount3", b"-u", b"-z", b"--", self.mountpoint]
            try:
                posix.waitpid(posix.posix_spawnp(words[0], words, posix.environ), 0)
            except OSError:
                pass  # it stays, and says that its endpoint is not connected
        return 1  # whoever waits for an answer gets an error

    def say(self, text: str) -> None:
        message = b"%s: %s" % (self.mountpoint, text.encode())
        if self.log == b"-":
            posix.write(2, b"unionfuse: " + message + b"\n")
        elif self.log:
            when = time.strftime("%Y-%m-%d %H:%M:%S,000")
            log = posix.open(self.log, posix.O_WRONLY | posix.O_APPEND | posix.O_CREAT, 0o644)
            posix.write(log, when.encode() + b" WARNING " + message + b"\n")
            posix.close(log)
        else:
            import syslog

            syslog.openlog("unionfuse", syslog.LOG_PID, syslog.LOG_DAEMON)
            syslog.syslog(syslog.LOG_WARNING, message.decode("utf-8", "replace"))


def mounted_on(path: bytes) -> bytes:
    """The device of the topmost mount on a path, as /proc has it; empty for none."""
    for character in b"\\ \t\n":
        path = path.replace(b"%c" % character, b"\\%03o" % character)
    found = text = b""
    mounts = posix.open("/proc/self/mountinfo", posix.O_RDONLY | posix.O_CLOEXEC)
    while piece := posix.read(mounts, 1 << 16):
        text += piece
    posix.close(mounts)
    for line in text.splitlines():
        words = line.split(b" ")
        if words[4] == path:
            found = words[2]
    return found


def main() -> None:
    words = [word.encode("utf-8", "surrogateescape") for word in sys.argv]
    ours, pid, ready = map(int, words[1:4])
    posix.chdir("/")
    keeper = Keeper(ours, pid, ready, words[4], words[5], words[6], words[7], words[9:])
    posix._exit(keeper.run())


if __name__ == "__main__":
    main()
