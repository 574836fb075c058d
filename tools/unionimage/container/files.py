"""The files that every container gets from outside its image: hosts, hostname, resolv.conf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unionimage.container.bundle import Mount

NAMES = ("hosts", "hostname", "resolv.conf")
# Docker's choice when the host names only servers that a container cannot reach.
FALLBACK_SERVERS = ("8.8.8.8", "8.8.4.4")
LOCAL_HOSTS = """127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""


def write(
    directory: Path,
    config: Mapping[str, Any],
    host_config: Mapping[str, Any],
    *,
    addresses: Sequence[str],
    gateway: str | None,
    servers: Sequence[str],
    host_network: bool,
) -> None:
    """Write the three files into a container's directory.

    Args:
        addresses: the container's own.
        gateway: what `--add-host NAME:host-gateway` means.
        servers: the name servers of its networks; empty for those of the host.
    """
    hostname = str(config["Hostname"])
    full = f"{hostname}.{config['Domainname']}" if config.get("Domainname") else hostname
    names = f"{full} {hostname}" if full != hostname else hostname
    lines = [f"{address}\t{names}\n" for address in addresses]
    if host_network:
        text = Path("/etc/hosts").read_text(errors="replace") if _exists("/etc/hosts") else ""
    else:
        text = LOCAL_HOSTS
    extra = []
    for entry in host_config.get("ExtraHosts") or []:
        name, _, address = entry.partition(":")
        if address == "host-gateway":
            address = gateway or "127.0.0.1"
        extra.append(f"{address}\t{name}\n")
    (directory / "hosts").write_text(text + "".join(extra + lines))
    (directory / "hostname").write_text(f"{hostname}\n")
    (directory / "resolv.conf").write_text(_resolv_conf(host_config, servers, host_network))


def mounts(directory: Path, taken: Iterable[str]) -> list[Mount]:
    """The files as bind mounts, except where the user mounts something else."""
    skipped = set(taken)
    return [
        Mount("bind", str(directory / name), f"/etc/{name}", ("rbind", "rprivate"))
        for name in NAMES
        if f"/etc/{name}" not in skipped
    ]


def _resolv_conf(host_config: Mapping[str, Any], servers: Sequence[str], host_network: bool) -> str:
    host = _host_resolver()
    chosen = list(host_config.get("Dns") or []) or list(servers)
    if not chosen:
        chosen = [one for one in host["nameserver"] if host_network or not _is_loopback(one)]
        chosen = chosen or list(FALLBACK_SERVERS)
    search = list(host_config.get("DnsSearch") or []) or host["search"]
    options = list(host_config.get("DnsOptions") or []) or host["options"]
    lines = [f"nameserver {server}\n" for server in chosen]
    if search and search != ["."]:
        lines.append(f"search {' '.join(search)}\n")
    if options:
        lines.append(f"options {' '.join(options)}\n")
    return "".join(lines)


def _host_resolver() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"nameserver": [], "search": [], "options": []}
    # systemd-resolved lists only itself in /etc; behind it are the real servers
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        if not _exists(path):
            continue
        servers = []
        for line in Path(path).read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                servers.append(words[1])
            elif len(words) > 1 and words[0] in ("search", "options"):
                found[words[0]] = words[1:]
        found["nameserver"] = servers
        if any(not _is_loopback(server) for server in servers):
            break
    return found


def _is_loopback(address: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _exists(path: str) -> bool:
    return Path(path).exists()
