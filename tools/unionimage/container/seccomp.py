"""Docker's default seccomp profile as data, and the OCI `linux.seccomp` object made from it.

What is not named is refused with EPERM. Some calls depend on an argument, on the capabilities that
the container has, or on the processor. A profile from a file (`--security-opt seccomp=FILE`) is in
docker's JSON form, which `from_docker` reads with the same rules.

Facts: docker's documentation ("Seccomp security profiles for Docker") and its public list of calls.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from unionimage.errors import UserError

ALLOWED = """
accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32
clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2
dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait
epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64
fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat
fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64
fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64
futex_wait futex_waitv futex_wake futimesat get_robust_list get_thread_area getcpu getcwd
getdents getdents64 getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32
getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresgid32
getresuid getresuid32 getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday
getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1
inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup
io_submit ioctl ioprio_get ioprio_set ipc kill landlock_add_rule landlock_create_ruleset
landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount listxattr
listxattrat llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 madvise
map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock
mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive
mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget
msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat _newselect
open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free
pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_mrelease
pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv
recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename
renameat renameat2 restart_syscall riscv_hwprobe rmdir rseq rt_sigaction rt_sigpending
rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64
rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64
sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select
semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg
sendto set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32
setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32
setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid setsockopt
setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd
signalfd4 sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs statfs64
statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time
timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime
timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime
timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat
uretprobe utime utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write
writev
"""

# Calls that a capability brings along.
BY_CAPABILITY = {
    "CAP_BPF": "bpf",
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_PERFMON": "perf_event_open",
    "CAP_SYS_ADMIN": """
        bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie
        lsm_get_self_attr lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount
        open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog
        umount umount2 unshare""",
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module finit_module init_module",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": """
        kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace""",
    "CAP_SYS_RAWIO": "ioperm iopl",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYSLOG": "syslog",
}

BY_ARCHITECTURE = {
    "amd64": "arch_prctl modify_ldt",
    "386": "modify_ldt",
    "arm": "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2",
    "arm64": "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2",
    "ppc64le": "swapcontext sync_file_range2",
    "riscv64": "riscv_flush_icache",
    "s390x": "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr",
}

# The first is the machine's own; the others are what the same kernel also runs.
SECCOMP_ARCHITECTURES = {
    "amd64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "arm64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
    "s390x": ("SCMP_ARCH_S390X", "SCMP_ARCH_S390"),
    "riscv64": ("SCMP_ARCH_RISCV64",),
    "ppc64le": ("SCMP_ARCH_PPC64LE",),
}

MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "armv7l": "arm"}

AF_ALG, AF_VSOCK = 38, 40  # sockets that reach the kernel's crypto code and the hypervisor
# PER_LINUX, PER_LINUX32, UNAME26, both, and "tell me".
PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
# Every CLONE_NEW* flag: a clone that makes a namespace needs CAP_SYS_ADMIN.
NAMESPACE_FLAGS = 0x7E020000
ENOSYS = 38

Rule = dict[str, Any]


def default_profile(capabilities: Collection[str], machine: str | None = None) -> Rule:
    """The OCI seccomp object for a container that has these capabilities."""
    architecture = _architecture(machine)
    names = set(ALLOWED.split()) | {"process_vm_readv", "process_vm_writev", "ptrace"}
    names |= set(BY_ARCHITECTURE.get(architecture, "").split())
    for capability in capabilities:
        names |= set(BY_CAPABILITY.get(capability, "").split())
    rules: list[Rule] = [{"names": sorted(names), "action": "SCMP_ACT_ALLOW"}]
    rules += [
        _allow("socket", 0, AF_ALG, "SCMP_CMP_LT"),
        _allow("socket", 0, AF_ALG + 1, "SCMP_CMP_EQ"),
        _allow("socket", 0, AF_VSOCK, "SCMP_CMP_GT"),
    ]
    rules += [_allow("personality", 0, value, "SCMP_CMP_EQ") for value in PERSONALITIES]
    if "CAP_SYS_ADMIN" not in capabilities:
        flags_at = 1 if architecture == "s390x" else 0
        plain_clone = _allow("clone", flags_at, NAMESPACE_FLAGS, "SCMP_CMP_MASKED_EQ")
        rules.append(plain_clone)
        # clone3 hides its flags behind a pointer; ENOSYS sends libc back to clone.
        rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS})
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": list(SECCOMP_ARCHITECTURES.get(architecture, ())),
        "syscalls": rules,
    }


def from_docker(
    profile: Mapping[str, Any], capabilities: Collection[str], machine: str | None = None
) -> Rule:
    """The OCI seccomp object for a profile in docker's JSON form.

    Raises UserError when it has no default action.
    """
    if "defaultAction" not in profile:
        raise UserError("the seccomp profile has no defaultAction")
    architecture = _architecture(machine)
    rules = []
    for entry in profile.get("syscalls") or []:
        wanted, unwanted = entry.get("includes") or {}, entry.get("excludes") or {}
        if not _applies(wanted, capabilities, architecture, empty=True):
            continue
        if unwanted and _applies(unwanted, capabilities, architecture, empty=False):
            continue
        names = entry.get("names") or [entry["name"]]
        rule: Rule = {"names": names, "action": entry["action"]}
        rule |= {key: entry[key] for key in ("args", "errnoRet") if entry.get(key)}
        rules.append(rule)
    result: Rule = {"defaultAction": profile["defaultAction"], "syscalls": rules}
    result |= {key: profile[key] for key in ("defaultErrnoRet", "flags") if key in profile}
    own = SECCOMP_ARCHITECTURES.get(architecture, ())
    result["architectures"] = profile.get("architectures") or list(own)
    return result


def _applies(
    condition: Mapping[str, Any], capabilities: Collection[str], architecture: str, *, empty: bool
) -> bool:
    """Whether a condition holds: all of its kinds to include, any of them to exclude."""
    answers = []
    if condition.get("caps"):
        answers.append(any(name in capabilities for name in condition["caps"]))
    if condition.get("arches"):
        answers.append(architecture in condition["arches"])
    if condition.get("minKernel"):
        answers.append(_kernel() >= tuple(int(n) for n in condition["minKernel"].split(".")))
    if not answers:
        return empty
    return all(answers) if empty else any(answers)


def _kernel() -> tuple[int, ...]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def _allow(name: str, index: int, value: int, comparison: str) -> Rule:
    argument = {"index": index, "value": value, "op": comparison}
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [argument]}


def _architecture(machine: str | None) -> str:
    machine = machine or os.uname().machine
    return MACHINES.get(machine, machine)
