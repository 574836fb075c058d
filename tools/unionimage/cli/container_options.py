"""The flags that `run` and `create` share: docker's names, checked where they become a record."""

from __future__ import annotations

import argparse


def add_container_options(parser: argparse.ArgumentParser) -> None:
    """Everything about the container; how a command attaches to it is `run`'s and `start`'s."""
    add = parser.add_argument
    many = {"action": "append", "default": []}
    flag = {"action": "store_true"}
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER)

    add("--name", help="a name for the container")
    add("--rm", help="remove the container when it ends", **flag)
    add("--cidfile", metavar="FILE", help="write the container's id to FILE")
    add("--pull", choices=("always", "missing", "never"), default="missing")
    add("--platform", help="the platform of an image that has several")
    add("-q", "--quiet", help="no progress while pulling", **flag)
    add("--runtime", metavar="crun|runc|PATH", help="the OCI runtime (default: what works)")
    add("--driver", choices=("fuse", "overlay"), help="what mounts the root file system")

    add("-i", "--interactive", help="keep standard input open", **flag)
    add("-t", "--tty", help="give it a terminal", **flag)
    add("-a", "--attach", metavar="stdin|stdout|stderr", **many)
    add("-e", "--env", metavar="NAME[=VALUE]", **many)
    add("--env-file", metavar="FILE", **many)
    add("-w", "--workdir", metavar="DIR")
    add("-u", "--user", metavar="USER[:GROUP]")
    add("--group-add", metavar="GROUP", **many)
    add("--entrypoint", metavar="COMMAND")
    add("-h", "--hostname", metavar="NAME")
    add("--domainname", metavar="NAME")
    add("-l", "--label", metavar="NAME=VALUE", **many)
    add("--label-file", metavar="FILE", **many)
    add("--annotation", metavar="NAME=VALUE", **many)
    add("--init", help="a small init as first process (tini)", **flag)
    add("--stop-signal", metavar="SIGNAL")
    add("--stop-timeout", metavar="SECONDS", type=int)
    add("--restart", metavar="no|always|unless-stopped|on-failure[:N]", default="no")
    add("--log-driver", metavar="json-file|none")
    add("--log-opt", metavar="max-size=SIZE|max-file=N", **many)

    add("--read-only", help="a root file system that nothing can write to", **flag)
    add("-v", "--volume", metavar="[NAME|DIR:]DIR[:ro]", **many)
    add("--mount", metavar="type=volume|bind|tmpfs,…", **many)
    add("--tmpfs", metavar="DIR[:OPTIONS]", **many)
    add("--volumes-from", metavar="CONTAINER[:ro]", **many)
    add("--shm-size", metavar="SIZE")

    add("--network", "--net", metavar="NAME", **many)
    add("--network-alias", "--net-alias", metavar="NAME", **many)
    add("--ip", metavar="ADDRESS")
    add("--mac-address", metavar="ADDRESS")
    add("-p", "--publish", metavar="[IP:]HOST:CONTAINER[/udp]", **many)
    add("-P", "--publish-all", help="publish every port that the image exposes", **flag)
    add("--expose", metavar="PORT", **many)
    add("--add-host", metavar="NAME:IP", **many)
    add("--dns", metavar="IP", **many)
    add("--dns-search", metavar="DOMAIN", **many)
    add("--dns-option", "--dns-opt", metavar="OPTION", **many)

    add("--pid", metavar="host|container:NAME")
    add("--ipc", metavar="private|shareable|host|none|container:NAME")
    add("--uts", metavar="host")
    add("--cgroupns", choices=("private", "host"))
    add("--userns", metavar="host|auto")
    add("--cgroup-parent", metavar="PATH")
    add("--privileged", help="all that this process may itself", **flag)
    add("--cap-add", metavar="NAME", **many)
    add("--cap-drop", metavar="NAME", **many)
    add("--security-opt", metavar="OPTION", **many)
    add("--device", metavar="HOST[:CONTAINER[:rwm]]", **many)
    add("--device-cgroup-rule", metavar="RULE", **many)
    add("--ulimit", metavar="NAME=SOFT[:HARD]", **many)
    add("--sysctl", metavar="NAME=VALUE", **many)
    add("--oom-score-adj", metavar="N", type=int)

    add_limits(parser)

    add("--health-cmd", metavar="COMMAND")
    add("--health-interval", metavar="DURATION")
    add("--health-timeout", metavar="DURATION")
    add("--health-start-period", metavar="DURATION")
    add("--health-start-interval", metavar="DURATION")
    add("--health-retries", metavar="N", type=int)
    add("--no-healthcheck", help="no health check, whatever the image says", **flag)


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
