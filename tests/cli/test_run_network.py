"""Networks: nothing, the host's, bridges with addresses, published ports and names."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.containers import Box, boxed, nothing_left
from harness.waiting import wait_until

SERVER = "mkdir /www; echo page > /www/index.html; exec httpd -f -p 80 -h /www"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/", timeout=2) as answer:
        return str(answer.read().decode())


def answers(address: str) -> bool:
    try:
        return fetch(address) == "page\n"
    except OSError:
        return False


def test_none_has_loopback_only(box: Box) -> None:
    out = box.sh("ls /sys/class/net; ip route")
    assert out.split() == ["lo"]


def test_host_is_the_hosts(box: Box) -> None:
    out = box.out("run", "--rm", "--network", "host", "busybox", "cat", "/proc/net/dev")
    inside = {line.split(":")[0].strip() for line in out.splitlines()[2:]}
    assert inside == set(
        Path("/sys/class/net").iterdir()
        and [path.name for path in Path("/sys/class/net").iterdir()]
    )
    command = ("busybox", "sh", "-c", "hostname; cat /etc/hostname; echo $HOSTNAME")
    said = box.out("run", "--rm", "--network", "host", *command)
    assert set(said.split()) == {os.uname().nodename}
    named = box.out("run", "--rm", "--network", "host", "--hostname", "other", *command)
    assert set(named.split()) == {"other"}


def test_published_port_answers_from_the_host(box: Box) -> None:
    port = free_port()
    box.start("web", "--network", "bridge", "-p", f"{port}:80", command=SERVER)
    wait_until(lambda: answers(f"127.0.0.1:{port}"), what="the answer")
    assert f"0.0.0.0:{port}->80/tcp" in box.out("ps")
    assert box.out("port", "web") == f"80/tcp -> 0.0.0.0:{port}\n"
    assert box.out("port", "web", "80") == f"0.0.0.0:{port}\n"
    box("port", "web", "81", code=1)
    done = box("run", "-d", "--name", "rival", "-p", f"{port}:80", "busybox", code=125)
    assert "port is already allocated" in done.stderr
    box("rm", "rival")
    box("stop", "-t", "0", "web")
    assert not answers(f"127.0.0.1:{port}")
    box("start", "web")
    wait_until(lambda: answers(f"127.0.0.1:{port}"), what="the answer after a start")


def test_a_port_of_the_host_that_is_taken(box: Box) -> None:
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen(1)
        port = server.getsockname()[1]
        done = box("run", "--rm", "-p", f"{port}:80", "busybox", code=125)
    assert "already allocated" in done.stderr
    assert box.names("-a") == []


def test_publish_all_and_random_ports(box: Box) -> None:
    box.image("exposes", exposed_ports=("80/tcp",))
    box("run", "-d", "--name", "auto", "-P", "-p", "127.0.0.1::81", "exposes", "sh", "-c", SERVER)
    table = json.loads(json.dumps(box.inspect("auto")))["NetworkSettings"]["Ports"]
    assert set(table) == {"80/tcp", "81/tcp"}
    assert table["81/tcp"][0]["HostIp"] == "127.0.0.1"
    port = table["80/tcp"][0]["HostPort"]
    wait_until(lambda: answers(f"127.0.0.1:{port}"))


def test_nothing_is_published_by_default(box: Box) -> None:
    box.image("exposes", exposed_ports=("80/tcp",))
    box("run", "-d", "--name", "quiet", "exposes", "sleep", "100")
    assert "80/tcp" in box.out("ps") and "->" not in box.out("ps")


def test_udp(box: Box) -> None:
    port = free_port()
    box.start("udp", "--network", "bridge", "-p", f"{port}:9/udp")
    # busybox has no datagram server: one of ours listens in the container's network namespace
    server = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        "s.bind(('0.0.0.0', 9)); print('ready', flush=True);"
        "data, peer = s.recvfrom(100); s.sendto(data.upper(), peer)"
    )
    enter = ["nsenter", "-t", str(box.state("udp")["Pid"]), "-n"]
    with subprocess.Popen(
        [*enter, sys.executable, "-c", server], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.sendto(b"hello", ("127.0.0.1", port))
            assert client.recvfrom(100)[0] == b"HELLO"


def test_names_on_a_network_of_its_own(box: Box) -> None:
    assert len(box.out("network", "create", "back").strip()) == 64
    box.start("server", "--network", "back", "--network-alias", "db", command=SERVER)
    out = box.out(
        "run",
        "--rm",
        "--network",
        "back",
        "--name",
        "client",
        "busybox",
        "sh",
        "-c",
        "wget -qO- http://server/; wget -qO- http://db/; cat /etc/hosts; hostname -i",
    )
    assert out.startswith("page\npage\n")
    address = out.split()[-1]
    assert f"{address}\t" in out
    # each address once: podman's engine adds the container's name to the other names by itself
    answer = box.out("run", "--rm", "--network", "back", "busybox", "nslookup", "server")
    server = box.inspect("server")["NetworkSettings"]["Networks"]["back"]["IPAddress"]
    assert answer.count(server) == 1
    # the other network hears nothing of it
    done = box("run", "--rm", "busybox", "nslookup", "server", code=None)
    assert done.returncode != 0
    assert "in use" in box("network", "rm", "back", code=1).stderr
    box("rm", "-f", "server")
    assert box.out("network", "rm", "back") == "back\n"


def test_addresses(box: Box) -> None:
    box("network", "create", "--subnet", "10.91.77.0/29", "tiny")
    shown = json.loads(box.out("network", "inspect", "tiny"))[0]
    assert shown["IPAM"]["Config"] == [{"Subnet": "10.91.77.0/29", "Gateway": "10.91.77.1"}]
    box.start(
        "fixed", "--network", "tiny", "--ip", "10.91.77.5", "--mac-address", "02:00:00:00:00:07"
    )
    out = box.out("exec", "fixed", "ip", "addr", "show", "eth0")
    assert "10.91.77.5/29" in out and "02:00:00:00:00:07" in out
    assert (
        "already in use"
        in box("run", "--rm", "--network", "tiny", "--ip", "10.91.77.5", "busybox", code=125).stderr
    )
    assert (
        "is not in"
        in box("run", "--rm", "--network", "tiny", "--ip", "10.1.1.1", "busybox", code=125).stderr
    )
    for number in range(4):
        box.start(f"more-{number}", "--network", "tiny")
    assert "no address left" in box("run", "--rm", "--network", "tiny", "busybox", code=125).stderr
    box("rm", "-f", "more-2")
    box("run", "--rm", "--network", "tiny", "busybox", "true")
    assert "overlaps" in box("network", "create", "--subnet", "10.91.77.0/24", "big", code=1).stderr


def test_connect_and_disconnect_while_it_runs(box: Box) -> None:
    box("network", "create", "side")
    box.start("mover", "--network", "bridge")
    box("network", "connect", "--alias", "handle", "side", "mover")
    assert "eth1" in box.out("exec", "mover", "ls", "/sys/class/net").split()
    out = box.out("run", "--rm", "--network", "side", "busybox", "ping", "-c", "1", "handle")
    assert "1 packets received" in out
    box("network", "disconnect", "side", "mover")
    assert "eth1" not in box.out("exec", "mover", "ls", "/sys/class/net").split()
    assert "not on network" in box("network", "disconnect", "side", "mover", code=1).stderr


def test_a_container_that_is_gone_is_disconnected(box: Box) -> None:
    assert "no such container" in box("network", "disconnect", "bridge", "gone", code=1).stderr
    box("network", "disconnect", "-f", "bridge", "gone")


def test_internal_network_has_no_way_out(box: Box) -> None:
    box("network", "create", "--internal", "vault")
    out = box.out("run", "--rm", "--network", "vault", "busybox", "ip", "route")
    assert "default" not in out


def test_the_special_networks(box: Box) -> None:
    names = box.out("network", "ls", "--format", "{{.Name}}").split()
    assert names[:3] == ["none", "host", "bridge"]
    assert "pre-defined" in box("network", "rm", "bridge", code=1).stderr
    assert "already exists" in (
        box("network", "create", "twice").stderr + box("network", "create", "twice", code=1).stderr
    )
    box("run", "--network", "none", "-p", "80:80", "busybox", code=125)


def test_no_rules_or_addresses_are_left(box: Box) -> None:
    box("network", "create", "brief")
    interface = json.loads(box.out("network", "inspect", "brief"))[0]["Interface"]
    subnet = json.loads(box.out("network", "inspect", "brief"))[0]["IPAM"]["Config"][0]["Subnet"]
    box("run", "--rm", "--network", "brief", "-p", f"{free_port()}:80", "busybox", "true")
    box("network", "rm", "brief")
    assert not Path("/sys/class/net", interface).exists()
    rules = subprocess.check_output(["iptables-save"], text=True)
    assert subnet not in rules


def test_a_network_written_in_full(box: Box) -> None:
    box("network", "create", "--attachable", "--subnet", "10.213.7.0/24", "full")
    wanted = "name=full,alias=db,ip=10.213.7.77,mac-address=02:00:00:00:77:77"
    box.start("long", "--network", wanted)
    entry = box.inspect("long")["NetworkSettings"]["Networks"]["full"]
    assert (entry["IPAddress"], entry["MacAddress"]) == ("10.213.7.77", "02:00:00:00:77:77")
    box("run", "--rm", "--network", "full", "busybox", "ping", "-c", "1", "-W", "5", "db")
    (member,) = json.loads(box.out("network", "inspect", "full"))[0]["Containers"].values()
    assert (member["Name"], member["IPv4Address"]) == ("long", "10.213.7.77/24")
    said = box("run", "--network", "name=full,ip6=::1", "busybox", "true", code=125).stderr
    assert "'ip6' is not one of name, alias, ip, mac-address" in said
    assert "--ipv6 is not supported" in box("network", "create", "--ipv6", "six", code=125).stderr


def interface_of(box: Box, network: str) -> Path:
    shown = json.loads(box.out("network", "inspect", network))[0]
    return Path("/sys/class/net", shown["Interface"])


def test_a_bridge_waits_for_the_next_container(box: Box) -> None:
    box("network", "create", "warm")
    bridge = interface_of(box, "warm")
    box("run", "--rm", "--network", "warm", "busybox", "true")
    address = (bridge / "address").read_text()
    box.start("first", "--network", "warm")
    box.start("second", "--network", "warm")
    assert (bridge / "address").read_text() == address, "who talks to it would lose it"
    box("exec", "second", "ping", "-c", "1", "-W", "5", "first")
    box("network", "prune", "-f")
    assert bridge.exists(), "its containers need it"
    box("rm", "-f", "first", "second")
    assert bridge.exists()
    box("network", "prune", "-f")
    assert not bridge.exists()
    assert bridge.name not in subprocess.check_output(["ip", "link"], text=True)


def test_the_default_bridge_goes_with_a_prune_and_with_the_spawner(box: Box) -> None:
    bridge = interface_of(box, "bridge")
    shown = json.loads(box.out("network", "inspect", "bridge"))[0]
    subnet = shown["IPAM"]["Config"][0]["Subnet"]

    def no_rules() -> bool:
        return subnet not in subprocess.check_output(["iptables-save"], text=True)

    box("run", "--rm", "busybox", "true")
    assert bridge.exists() and not no_rules()
    box("system", "prune", "-f")
    assert not bridge.exists() and no_rules()
    box("run", "--rm", "busybox", "true")
    for place in box.run_root.glob("spawner-*"):
        place.unlink()
    wait_until(lambda: not bridge.exists() and no_rules(), 20, "the spawner puts it away")


def test_a_start_that_fails_gives_its_network_back(box: Box) -> None:
    port = free_port()
    box("run", "-p", f"127.0.0.1:{port}:80", "-u", "nobody-there", "busybox", "true", code=125)
    assert nothing_left(box)
    assert f"dport {port}" not in subprocess.check_output(["iptables-save"], text=True)
    box("run", "--rm", "-p", f"127.0.0.1:{port}:80", "busybox", "true")


def test_two_stores_do_not_get_into_each_others_way(box: Box, scratch: Path) -> None:
    """The engine's chains are one host's: whoever ends does not take away what another needs."""

    def run(one: Box) -> None:
        for _ in range(3):
            one("run", "--rm", "-p", f"{free_port()}:80", "busybox", "true")

    for other in boxed(scratch / "other"):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, (box, other)))
