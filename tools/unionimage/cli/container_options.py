"""The flags that `run` and `create` share: docker's names, checked where they become a record."""

from __future__ import annotations

import argparse

from unionimage.cli.parser import add_name_and_command


def add_container_options(parser: argparse.ArgumentParser) -> None:
    """Everything about the container; how a command attaches to it is `run`'s and `start`'s."""
    parser.usage = "%(prog)s [OPTION…] IMAGE [COMMAND] [ARGUMENT…]"  # 90 options tell nothing
    add = parser.add_argument

    def many(*names: str, metavar: str, help: str) -> None:
        add(*names, metavar=metavar, help=help, action="append", default=[])

    def flag(*names: str, help: str) -> None:
        add(*names, help=help, action="store_true")

    add_name_and_command(parser, "image", "command", "the image, and a command instead of its own")

    add("--name", help="a name for the container")
    flag("--rm", help="remove the container when it ends")
    add("--cidfile", metavar="FILE", help="write the container's id to FILE")
    add(
        "--pull",
        choices=("always", "missing", "never"),
        default="missing",
        help="look for the image in its registry: always, when it is missing, never",
    )
    add("--platform", help="the platform of an image that has several")
    flag("-q", "--quiet", help="no progress while pulling")
    add("--runtime", metavar="crun|runc|PATH", help="the OCI runtime (default: what works)")
    add("--driver", choices=("fuse", "overlay"), help="what mounts the root file system")

    flag("-i", "--interactive", help="keep standard input open")
    flag("-t", "--tty", help="give it a terminal")
    many("-a", "--attach", metavar="stdin|stdout|stderr", help="attach only this stream")
    many(
        "-e",
        "--env",
        metavar="NAME[=VALUE]",
        help="set a variable; a bare NAME takes the value from here",
    )
    many("--env-file", metavar="FILE", help="set the variables of a file, one NAME=VALUE a line")
    add("-w", "--workdir", metavar="DIR", help="the directory that the command starts in")
    add("-u", "--user", metavar="USER[:GROUP]", help="who runs the command, by name or number")
    many("--group-add", metavar="GROUP", help="one more group for the process")
    add("--entrypoint", metavar="COMMAND", help="run this instead of the image's entrypoint")
    add("-h", "--hostname", metavar="NAME", help="the host name inside")
    add("--domainname", metavar="NAME", help="the NIS domain name inside")
    many("-l", "--label", metavar="NAME=VALUE", help="note something about the container")
    many("--label-file", metavar="FILE", help="labels of a file, one NAME=VALUE a line")
    many("--annotation", metavar="NAME=VALUE", help="pass an annotation to the runtime")
    flag("--init", help="a small init as first process (tini)")
    add("--stop-signal", metavar="SIGNAL", help="the signal that stops it (default: SIGTERM)")
    add(
        "--stop-timeout",
        metavar="SECONDS",
        type=int,
        help="how long stop waits before it kills (default: 10)",
    )
    add(
        "--restart",
        metavar="no|always|unless-stopped|on-failure[:N]",
        default="no",
        help="when to start it again after it ended",
    )
    add("--log-driver", metavar="json-file|none", help="where output is kept")
    many(
        "--log-opt",
        metavar="max-size=SIZE|max-file=N",
        help="how large log files become, and how many are kept",
    )

    flag("--read-only", help="a root file system that nothing can write to")
    many(
        "-v",
        "--volume",
        metavar="[NAME|DIR:]DIR[:ro]",
        help="mount a volume or a directory of the host",
    )
    many("--mount", metavar="type=volume|bind|tmpfs,…", help="mount something, written in full")
    many("--tmpfs", metavar="DIR[:OPTIONS]", help="mount a directory in memory")
    many("--volumes-from", metavar="CONTAINER[:ro]", help="mount what another container mounts")
    add("--shm-size", metavar="SIZE", help="the size of /dev/shm (default: 64m)")

    many(
        "--network",
        "--net",
        metavar="NAME",
        help="none, host, bridge, container:NAME or a network of your own",
    )
    many("--network-alias", "--net-alias", metavar="NAME", help="one more name on its network")
    add("--ip", metavar="ADDRESS", help="this address on a network of your own")
    add("--mac-address", metavar="ADDRESS", help="this Ethernet address")
    many(
        "-p",
        "--publish",
        metavar="[IP:]HOST:CONTAINER[/udp]",
        help="make a port of the container reachable on the host",
    )
    flag("-P", "--publish-all", help="publish every port that the image exposes")
    many("--expose", metavar="PORT", help="a port that -P publishes too")
    many("--add-host", metavar="NAME:IP", help="one more line in /etc/hosts")
    many("--dns", metavar="IP", help="a name server")
    many("--dns-search", metavar="DOMAIN", help="a domain to search names in")
    many("--dns-option", "--dns-opt", metavar="OPTION", help="an option in resolv.conf")

    add("--pid", metavar="host|container:NAME", help="whose processes it sees")
    add(
        "--ipc",
        metavar="private|shareable|host|none|container:NAME",
        help="whose shared memory and queues it uses",
    )
    add("--uts", metavar="host", help="the host's host name")
    add(
        "--cgroupns",
        choices=("private", "host"),
        help="a cgroup namespace of its own (default) or not",
    )
    add("--userns", metavar="host|auto", help="auto: a user namespace of its own")
    add("--cgroup-parent", metavar="PATH", help="below which cgroup its own is made")
    flag("--privileged", help="all that this process may itself")
    many("--cap-add", metavar="NAME", help="give a capability, or ALL")
    many("--cap-drop", metavar="NAME", help="take a capability away, or ALL")
    many(
        "--security-opt",
        metavar="OPTION",
        help="seccomp=FILE|unconfined, no-new-privileges, systempaths=unconfined",
    )
    many("--device", metavar="HOST[:CONTAINER[:rwm]]", help="let it use a device of the host")
    many("--device-cgroup-rule", metavar="RULE", help="allow devices, as 'c 13:* rwm'")
    many(
        "--ulimit",
        metavar="NAME=SOFT[:HARD]",
        help="a resource limit of the process (getrlimit(2))",
    )
    many("--sysctl", metavar="NAME=VALUE", help="a kernel setting of its namespaces")
    add(
        "--oom-score-adj",
        metavar="N",
        type=int,
        help="how likely it is killed when memory runs out, -1000 to 1000",
    )

    add_limits(parser)

    add("--health-cmd", metavar="COMMAND", help="a shell command that succeeds while all is well")
    add("--health-interval", metavar="DURATION", help="how often it runs (default: 30s)")
    add("--health-timeout", metavar="DURATION", help="how long it may take (default: 30s)")
    add("--health-start-period", metavar="DURATION", help="failures do not count for so long")
    add(
        "--health-start-interval",
        metavar="DURATION",
        help="how often it runs in that time (default: 5s)",
    )
    add(
        "--health-retries",
        metavar="N",
        type=int,
        help="so many failures in a row make it unhealthy (default: 3)",
    )
    flag("--no-healthcheck", help="no health check, whatever the image says")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The limits that `update` can change too."""
    add = parser.add_argument
    add(
        "-c",
        "--cpu-shares",
        metavar="N",
        type=int,
        help="weight of its share of the CPUs (2 to 262144)",
    )
    add("--cpus", metavar="NUMBER", help="how many CPUs it may use, as 1.5")
    add("--cpu-period", metavar="MICROSECONDS", type=int, help="the CFS period")
    add("--cpu-quota", metavar="MICROSECONDS", type=int, help="CPU time in each period")
    add("--cpuset-cpus", metavar="0-3,5", help="the CPUs that it may run on")
    add("--cpuset-mems", metavar="0-3,5", help="the memory nodes that it may use")
    add("-m", "--memory", metavar="SIZE", help="the most memory, as 512m")
    add("--memory-swap", metavar="SIZE", help="memory and swap together; -1 for no limit")
    add(
        "--memory-reservation",
        metavar="SIZE",
        help="the memory it is left with when memory runs short",
    )
    add(
        "--memory-swappiness",
        metavar="0-100",
        type=int,
        help="how readily its memory is swapped (cgroup v1)",
    )
    add(
        "--oom-kill-disable",
        action="store_true",
        help="wait instead of being killed when memory runs out (cgroup v1)",
    )
    add(
        "--pids-limit",
        metavar="N",
        type=int,
        help="how many processes it may have; -1 for no limit",
    )
    add(
        "--blkio-weight",
        metavar="10-1000",
        type=int,
        help="weight of its share of disk I/O (needs bfq)",
    )
    for name in ("read-bps", "write-bps", "read-iops", "write-iops"):
        what = "how fast a disk may be used: bytes or operations a second"
        add(f"--device-{name}", metavar="DEVICE:RATE", help=what, action="append", default=[])
