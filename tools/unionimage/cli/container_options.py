"""The flags that `run` and `create` share: docker's names, checked where they become a record."""

from __future__ import annotations

import argparse


def add_container_options(parser: argparse.ArgumentParser) -> None:
    """Everything about the container; how a command attaches to it is `run`'s and `start`'s."""
    add = parser.add_argument

    def many(*names: str, metavar: str) -> None:
        add(*names, metavar=metavar, action="append", default=[])

    def flag(*names: str, help: str) -> None:
        add(*names, help=help, action="store_true")

    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER)

    add("--name", help="a name for the container")
    flag("--rm", help="remove the container when it ends")
    add("--cidfile", metavar="FILE", help="write the container's id to FILE")
    add("--pull", choices=("always", "missing", "never"), default="missing")
    add("--platform", help="the platform of an image that has several")
    flag("-q", "--quiet", help="no progress while pulling")
    add("--runtime", metavar="crun|runc|PATH", help="the OCI runtime (default: what works)")
    add("--driver", choices=("fuse", "overlay"), help="what mounts the root file system")

    flag("-i", "--interactive", help="keep standard input open")
    flag("-t", "--tty", help="give it a terminal")
    many("-a", "--attach", metavar="stdin|stdout|stderr")
    many("-e", "--env", metavar="NAME[=VALUE]")
    many("--env-file", metavar="FILE")
    add("-w", "--workdir", metavar="DIR")
    add("-u", "--user", metavar="USER[:GROUP]")
    many("--group-add", metavar="GROUP")
    add("--entrypoint", metavar="COMMAND")
    add("-h", "--hostname", metavar="NAME")
    add("--domainname", metavar="NAME")
    many("-l", "--label", metavar="NAME=VALUE")
    many("--label-file", metavar="FILE")
    many("--annotation", metavar="NAME=VALUE")
    flag("--init", help="a small init as first process (tini)")
    add("--stop-signal", metavar="SIGNAL")
    add("--stop-timeout", metavar="SECONDS", type=int)
    add("--restart", metavar="no|always|unless-stopped|on-failure[:N]", default="no")
    add("--log-driver", metavar="json-file|none")
    many("--log-opt", metavar="max-size=SIZE|max-file=N")

    flag("--read-only", help="a root file system that nothing can write to")
    many("-v", "--volume", metavar="[NAME|DIR:]DIR[:ro]")
    many("--mount", metavar="type=volume|bind|tmpfs,…")
    many("--tmpfs", metavar="DIR[:OPTIONS]")
    many("--volumes-from", metavar="CONTAINER[:ro]")
    add("--shm-size", metavar="SIZE")

    many("--network", "--net", metavar="NAME")
    many("--network-alias", "--net-alias", metavar="NAME")
    add("--ip", metavar="ADDRESS")
    add("--mac-address", metavar="ADDRESS")
    many("-p", "--publish", metavar="[IP:]HOST:CONTAINER[/udp]")
    flag("-P", "--publish-all", help="publish every port that the image exposes")
    many("--expose", metavar="PORT")
    many("--add-host", metavar="NAME:IP")
    many("--dns", metavar="IP")
    many("--dns-search", metavar="DOMAIN")
    many("--dns-option", "--dns-opt", metavar="OPTION")

    add("--pid", metavar="host|container:NAME")
    add("--ipc", metavar="private|shareable|host|none|container:NAME")
    add("--uts", metavar="host")
    add("--cgroupns", choices=("private", "host"))
    add("--userns", metavar="host|auto")
    add("--cgroup-parent", metavar="PATH")
    flag("--privileged", help="all that this process may itself")
    many("--cap-add", metavar="NAME")
    many("--cap-drop", metavar="NAME")
    many("--security-opt", metavar="OPTION")
    many("--device", metavar="HOST[:CONTAINER[:rwm]]")
    many("--device-cgroup-rule", metavar="RULE")
    many("--ulimit", metavar="NAME=SOFT[:HARD]")
    many("--sysctl", metavar="NAME=VALUE")
    add("--oom-score-adj", metavar="N", type=int)

    add_limits(parser)

    add("--health-cmd", metavar="COMMAND")
    add("--health-interval", metavar="DURATION")
    add("--health-timeout", metavar="DURATION")
    add("--health-start-period", metavar="DURATION")
    add("--health-start-interval", metavar="DURATION")
    add("--health-retries", metavar="N", type=int)
    flag("--no-healthcheck", help="no health check, whatever the image says")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The limits that `update` can change too."""
    add = parser.add_argument
    add("-c", "--cpu-shares", metavar="N", type=int)
    add("--cpus", metavar="NUMBER")
    add("--cpu-period", metavar="MICROSECONDS", type=int)
    add("--cpu-quota", metavar="MICROSECONDS", type=int)
    add("--cpuset-cpus", metavar="0-3,5")
    add("--cpuset-mems", metavar="0-3,5")
    add("-m", "--memory", metavar="SIZE")
    add("--memory-swap", metavar="SIZE", help="memory and swap together; -1 for no limit")
    add("--memory-reservation", metavar="SIZE")
    add("--memory-swappiness", metavar="0-100", type=int)
    add("--oom-kill-disable", action="store_true")
    add("--pids-limit", metavar="N", type=int)
    add("--blkio-weight", metavar="10-1000", type=int)
    for name in ("read-bps", "write-bps", "read-iops", "write-iops"):
        add(f"--device-{name}", metavar="DEVICE:RATE", action="append", default=[])
