"""What `inspect` and `ps` tell of a container: docker's names for it, all of them."""

import json

from harness.containers import Box

# Of docker 20.10's object of a running container; templates of all kinds ask for them.
TOP = """\
Id Created Path Args State Image ResolvConfPath HostnamePath HostsPath LogPath Name RestartCount
Driver Platform MountLabel ProcessLabel AppArmorProfile ExecIDs HostConfig GraphDriver Mounts
Config NetworkSettings
"""
HOST_CONFIG = """\
Binds ContainerIDFile LogConfig NetworkMode PortBindings RestartPolicy AutoRemove VolumeDriver
VolumesFrom CapAdd CapDrop CgroupnsMode Dns DnsOptions DnsSearch ExtraHosts GroupAdd IpcMode
Cgroup Links OomScoreAdj PidMode Privileged PublishAllPorts ReadonlyRootfs SecurityOpt UTSMode
UsernsMode ShmSize Runtime ConsoleSize Isolation CpuShares Memory NanoCpus CgroupParent
BlkioWeight BlkioWeightDevice BlkioDeviceReadBps BlkioDeviceWriteBps BlkioDeviceReadIOps
BlkioDeviceWriteIOps CpuPeriod CpuQuota CpuRealtimePeriod CpuRealtimeRuntime CpusetCpus
CpusetMems Devices DeviceCgroupRules DeviceRequests KernelMemory KernelMemoryTCP
MemoryReservation MemorySwap MemorySwappiness OomKillDisable PidsLimit Ulimits CpuCount
CpuPercent IOMaximumIOps IOMaximumBandwidth MaskedPaths ReadonlyPaths
"""
CONFIG = """\
Hostname Domainname User AttachStdin AttachStdout AttachStderr Tty OpenStdin StdinOnce Env Cmd
Image Volumes WorkingDir Entrypoint OnBuild Labels
"""
NETWORK = """\
Bridge SandboxID HairpinMode LinkLocalIPv6Address LinkLocalIPv6PrefixLen Ports SandboxKey
SecondaryIPAddresses SecondaryIPv6Addresses EndpointID Gateway GlobalIPv6Address
GlobalIPv6PrefixLen IPAddress IPPrefixLen IPv6Gateway MacAddress Networks
"""
ENDPOINT = """\
IPAMConfig Links Aliases NetworkID EndpointID Gateway IPAddress IPPrefixLen IPv6Gateway
GlobalIPv6Address GlobalIPv6PrefixLen MacAddress DriverOpts
"""


def test_inspect_has_whatever_dockers_has(box: Box) -> None:
    box("create", "--name", "whole", "-v", "data:/data", "-v", "/tmp:/host:ro", "--memory", "64m",
        "busybox", "true")  # fmt: skip
    shown = box.inspect("whole")
    assert not set(TOP.split()) - shown.keys()
    assert not set(HOST_CONFIG.split()) - shown["HostConfig"].keys()
    assert not set(CONFIG.split()) - shown["Config"].keys()
    assert not set(NETWORK.split()) - shown["NetworkSettings"].keys()
    assert not set(ENDPOINT.split()) - shown["NetworkSettings"]["Networks"]["bridge"].keys()
    assert shown["HostConfig"]["Binds"] == ["data:/data", "/tmp:/host:ro"]
    assert shown["HostConfig"]["MemorySwap"] == 128 << 20
    assert "/proc/kcore" in shown["HostConfig"]["MaskedPaths"]
    assert shown["Config"]["WorkingDir"] == ""
    sizes = box.out("inspect", "-s", "-f", "{{.SizeRw}} {{.SizeRootFs}}", "whole").split()
    assert sizes[0] == "0" and int(sizes[1]) > 1_000_000


def test_the_driver_is_the_one_that_mounts_it(box: Box) -> None:
    box("create", "--name", "first", "busybox", "true")
    box("create", "--name", "second", "--driver", "fuse", "busybox", "true")
    template = "{{.Driver}} {{.GraphDriver.Name}}"
    assert box.out("inspect", "-f", template, "first", "second") == "overlay overlay\nfuse fuse\n"


def test_a_commit_adds_nothing_that_the_image_did_not_say(box: Box) -> None:
    box("create", "--name", "plain", "busybox", "true")
    box("commit", "plain", "again")
    config = json.loads(box.out("inspect", "-f", "{{json .Config}}", "again"))
    assert (config["WorkingDir"], config["StopSignal"]) == ("", "")


def test_ps_shows_sizes_and_labels_as_docker(box: Box) -> None:
    box("run", "--network", "none", "--name", "sized", "-l", "a=1,2", "-l", "b=x", "busybox",
        "sh", "-c", "printf 12345 > /five")  # fmt: skip
    assert box.out("ps", "-a", "--format", '{{.Label "a"}} {{.Label "nope"}}.') == "1,2 .\n"
    size = box.out("ps", "-a", "--format", "{{.Size}}")
    assert size.startswith("5B (virtual ") and size.endswith("MB)\n")
    assert json.loads(box.out("ps", "-a", "--format", "{{json .}}"))["Size"] == size.strip()
    heading, row = box.out("ps", "-a", "-s").splitlines()
    assert heading.startswith("CONTAINER ID   IMAGE     COMMAND ")
    assert heading.endswith("NAMES     SIZE") and row.endswith(f"sized     {size.strip()}")


def test_wait_goes_on_after_one_that_is_not_there(box: Box) -> None:
    box.start("three", command="exit 3")
    done = box("wait", "nope", "three", code=1)
    assert (done.stdout, done.stderr) == ("3\n", "unionfuse wait: no such container: nope\n")


def test_a_flag_that_is_not_here_is_refused_with_the_reason(box: Box) -> None:
    said = box("run", "--gpus", "all", "busybox", code=125).stderr
    assert said.startswith("unionfuse run: --gpus is not supported: ") and said.count("\n") == 1
    accepted = ("--isolation", "default", "--volume-driver=local", "--disable-content-trust=true")
    assert box.sh("echo here", *accepted) == "here\n"


def test_exec_by_a_user_that_is_not_there(box: Box) -> None:
    box.start("who")
    assert "unable to find user nope" in box("exec", "-u", "nope", "who", "true", code=126).stderr
