"""The flags that `run` and `create` share: docker's names, checked where they become a record."""

from __future__ import annotations

import argparse

from unionimage.cli.parser import VerbParser, add_name_and_command

# Docker's flags that are refused, and why.
REFUSED = {
    "--gpus": "no device driver hands GPUs out; --device passes single devices",
    "--link": "put both on a network of their own, where names are resolved",
    "--ip6": "networks have IPv4 addresses only",
    "--link-local-ip": "networks have the addresses of their subnet only",
    "--storage-opt": "the writable layer has no options of its own",
    "--kernel-memory": "the kernel no longer has this limit",
    "--cpu-rt-period": "real-time groups are not supported",
    "--cpu-rt-runtime": "real-time groups are not supported",
    "--use-api-socket": "there is no daemon whose socket it could use",
    "--cpu-count": "it is for Windows; see --cpus",
    "--cpu-percent": "it is for Windows; see --cpus",
    "--io-maxbandwidth": "it is for Windows; see --device-read-bps",
    "--io-maxiops": "it is for Windows; see --device-read-iops",
}


class _Adder:
    """Adds options of the three kinds that there are."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.one = parser.add_argument  # with a value, once

    def many(self, *names: str, metavar: str, help: str) -> None:
        """With a value, as often as one likes."""
        self.one(*names, metavar=metavar, help=help, action="append", default=[])

    def flag(self, *names: str, help: str) -> None:
        """Without a value."""
        self.one(*names, help=help, action="store_true")


def add_container_options(parser: argparse.ArgumentParser) -> None:
    """Everything about the container; how a command attaches to it is `run`'s and `start`'s."""
    parser.usage = "%(prog)s [OPTION…] IMAGE [COMMAND] [ARGUMENT…]"  # 90 options tell nothing
    add_name_and_command(parser, "image", "command", "the image, and a command instead of its own")
    assert isinstance(parser, VerbParser)
    parser.refused |= REFUSED
    add = _Adder(parser)
    for group in (_itself, _process, _files, _network, _isolation):
        group(add)
    add_limits(parser)
    _health(add)


def _itself(add: _Adder) -> None:
    """The container as a thing that is kept."""
    add.one("--name", help="a name for the container")
    add.flag("--rm", help="remove the container when it ends")
    add.one("--cidfile", metavar="FILE", help="write the container's id to FILE")
    add.one(
        "--pull",
        choices=("always", "missing", "never"),
        default="missing",
        help="look for the image in its registry: always, when it is missing, never",
    )
    add.one("--platform", help="the platform of an image that has several")
    add.flag("--disable-content-trust", help="as docker's default: no signatures are asked for")
    add.flag("-q", "--quiet", help="no progress while pulling")
    add.one("--runtime", metavar="crun|runc|PATH", help="the OCI runtime (default: what works)")
    add.one("--driver", choices=("fuse", "overlay"), help="what mounts the root file system")
    add.one("--isolation", choices=("default",), help="docker's on Windows: one kind is here")


def _process(add: _Adder) -> None:
    """The command that runs in it, and when and how it ends."""
    add.flag("-i", "--interactive", help="keep standard input open")
    add.flag("-t", "--tty", help="give it a terminal")
    add.many("-a", "--attach", metavar="stdin|stdout|stderr", help="attach only this stream")
    add.many(
        "-e",
        "--env",
        metavar="NAME[=VALUE]",
        help="set a variable; a bare NAME takes the value from here",
    )
    add.many(
        "--env-file", metavar="FILE", help="set the variables of a file, one NAME=VALUE a line"
    )
    add.one("-w", "--workdir", metavar="DIR", help="the directory that the command starts in")
    add.one("-u", "--user", metavar="USER[:GROUP]", help="who runs the command, by name or number")
    add.many("--group-add", metavar="GROUP", help="one more group for the process")
    add.one("--entrypoint", metavar="COMMAND", help="run this instead of the image's entrypoint")
    add.one("-h", "--hostname", metavar="NAME", help="the host name inside")
    add.one("--domainname", metavar="NAME", help="the NIS domain name inside")
    add.many("-l", "--label", metavar="NAME=VALUE", help="note something about the container")
    add.many("--label-file", metavar="FILE", help="labels of a file, one NAME=VALUE a line")
    add.many("--annotation", metavar="NAME=VALUE", help="pass an annotation to the runtime")
    add.flag("--init", help="a small init as first process (tini)")
    add.one("--stop-signal", metavar="SIGNAL", help="the signal that stops it (default: SIGTERM)")
    add.one(
        "--stop-timeout",
        metavar="SECONDS",
        type=int,
        help="how long stop waits before it kills (default: 10)",
    )
    add.one(
        "--restart",
        metavar="no|always|unless-stopped|on-failure[:N]",
        default="no",
        help="when to start it again after it ended",
    )
    add.one("--log-driver", metavar="json-file|none", help="where output is kept")
    add.many(
        "--log-opt",
        metavar="max-size=SIZE|max-file=N",
        help="how large log files become, and how many are kept",
    )


def _files(add: _Adder) -> None:
    """What is mounted into it."""
    add.flag("--read-only", help="a root file system that nothing can write to")
    add.many(
        "-v",
        "--volume",
        metavar="[NAME|DIR:]DIR[:ro]",
        help="mount a volume or a directory of the host",
    )
    add.many("--mount", metavar="type=volume|bind|tmpfs,…", help="mount something, written in full")
    add.one("--volume-driver", choices=("local",), help="the driver of its volumes: one is there")
    add.many("--tmpfs", metavar="DIR[:OPTIONS]", help="mount a directory in memory")
    add.many("--volumes-from", metavar="CONTAINER[:ro]", help="mount what another container mounts")
    add.one("--shm-size", metavar="SIZE", help="the size of /dev/shm (default: 64m)")


def _network(add: _Adder) -> None:
    """Its networks and names."""
    add.many(
        "--network",
        "--net",
        metavar="NAME",
        help="none, host, bridge, container:NAME or a network of your own",
    )
    add.many("--network-alias", "--net-alias", metavar="NAME", help="one more name on its network")
    add.one("--ip", metavar="ADDRESS", help="this address on a network of your own")
    add.one("--mac-address", metavar="ADDRESS", help="this Ethernet address")
    add.many(
        "-p",
        "--publish",
        metavar="[IP:]HOST:CONTAINER[/udp]",
        help="make a port of the container reachable on the host",
    )
    add.flag("-P", "--publish-all", help="publish every port that the image exposes")
    add.many("--expose", metavar="PORT", help="a port that -P publishes too")
    add.many("--add-host", metavar="NAME:IP", help="one more line in /etc/hosts")
    add.many("--dns", metavar="IP", help="a name server")
    add.many("--dns-search", metavar="DOMAIN", help="a domain to search names in")
    add.many("--dns-option", "--dns-opt", metavar="OPTION", help="an option in resolv.conf")


def _isolation(add: _Adder) -> None:
    """What it shares with the host, and what it may."""
    add.one("--pid", metavar="host|container:NAME", help="whose processes it sees")
    add.one(
        "--ipc",
        metavar="private|shareable|host|none|container:NAME",
        help="whose shared memory and queues it uses",
    )
    add.one("--uts", metavar="host", help="the host's host name")
    add.one(
        "--cgroupns",
        choices=("private", "host"),
        help="a cgroup namespace of its own (default) or not",
    )
    add.one("--userns", metavar="host|auto", help="auto: a user namespace of its own")
    add.one("--cgroup-parent", metavar="PATH", help="below which cgroup its own is made")
    add.flag("--privileged", help="all that this process may itself")
    add.many("--cap-add", metavar="NAME", help="give a capability, or ALL")
    add.many("--cap-drop", metavar="NAME", help="take a capability away, or ALL")
    add.many(
        "--security-opt",
        metavar="OPTION",
        help="seccomp=FILE|unconfined, no-new-privileges, systempaths=unconfined",
    )
    add.many("--device", metavar="HOST[:CONTAINER[:rwm]]", help="let it use a device of the host")
    add.many("--device-cgroup-rule", metavar="RULE", help="allow devices, as 'c 13:* rwm'")
    add.many(
        "--ulimit",
        metavar="NAME=SOFT[:HARD]",
        help="a resource limit of the process (getrlimit(2))",
    )
    add.many("--sysctl", metavar="NAME=VALUE", help="a kernel setting of its namespaces")
    add.one(
        "--oom-score-adj",
        metavar="N",
        type=int,
        help="how likely it is killed when memory runs out, -1000 to 1000",
    )


def _health(add: _Adder) -> None:
    """How its health is checked."""
    add.one(
        "--health-cmd", metavar="COMMAND", help="a shell command that succeeds while all is well"
    )
    add.one("--health-interval", metavar="DURATION", help="how often it runs (default: 30s)")
    add.one("--health-timeout", metavar="DURATION", help="how long it may take (default: 30s)")
    add.one("--health-start-period", metavar="DURATION", help="failures do not count for so long")
    add.one(
        "--health-start-interval",
        metavar="DURATION",
        help="how often it runs in that time (default: 5s)",
    )
    add.one(
        "--health-retries",
        metavar="N",
        type=int,
        help="so many failures in a row make it unhealthy (default: 3)",
    )
    add.flag("--no-healthcheck", help="no health check, whatever the image says")


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
    add(
        "--blkio-weight-device",
        metavar="DEVICE:WEIGHT",
        help="the weight of its share of one disk (needs bfq)",
        action="append",
        default=[],
    )
    for name in ("read-bps", "write-bps", "read-iops", "write-iops"):
        what = "how fast a disk may be used: bytes or operations a second"
        add(f"--device-{name}", metavar="DEVICE:RATE", help=what, action="append", default=[])
