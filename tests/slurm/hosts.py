"""The hosts that a cluster of tests consists of: this machine under several names, or hosts of its own.

Hosts of its own are network, host name and mount namespaces, joined by a bridge in a namespace of its own: each has its
own name, address and loopback, and a link that can be cut. The machine's own network takes no part. A namespace lasts
as long as the process that holds it.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

CONTROLLER = "ctl"
INTERFACE = "eth0"
HOLD = "hostname {name} && mount --bind {hosts} /etc/hosts && echo ready && exec sleep infinity"


@dataclass(frozen=True)
class Host:
    """`name` and `address` as other hosts know them; `holder` is the process whose namespaces it is, 0 for none."""

    name: str
    address: str
    holder: int = 0

    def command(self, arguments: list[str], folder: Path) -> list[str]:
        """What runs `arguments` on this host, in `folder`."""
        if not self.holder:
            return arguments
        return ["nsenter", f"--target={self.holder}", "--net", "--uts", "--mount", f"--wdns={folder}", *arguments]


def this_machine(num_nodes: int) -> list[Host]:
    """The controller and nodes that differ by their ports alone."""
    names = [os.uname().nodename.split(".")[0], *(f"node{i + 1}" for i in range(num_nodes))]
    return [Host(name, "127.0.0.1") for name in names]


@dataclass
class Network:
    """Hosts in namespaces, the controller first, and the process that holds their bridge."""

    hosts: list[Host]
    switch: subprocess.Popen[str]
    holders: list[subprocess.Popen[str]] = field(default_factory=list)

    @classmethod
    def up(cls, folder: Path, num_nodes: int, environment: dict[str, str]) -> Network:
        names = [CONTROLLER, *(f"node{i + 1}" for i in range(num_nodes))]
        addresses = {name: f"10.77.0.{i + 1}" for i, name in enumerate(names)}
        network = cls([], _held(["--net"], "echo ready && exec sleep infinity", environment))
        network._ip("link", "add", "bridge", "type", "bridge")
        network._ip("link", "set", "bridge", "up")
        for name, address in addresses.items():
            known = {"localhost": "127.0.0.1", **addresses, name: "127.0.1.1"}  # its own as Debian has it
            hosts_file = folder / f"hosts.{name}"
            hosts_file.write_text("".join(f"{address} {name}\n" for name, address in known.items()))
            network._add(name, address, HOLD.format(name=name, hosts=hosts_file), environment)
        return network

    def cut(self, name: str) -> None:
        """Take the cable of a host out."""
        self._ip("link", "set", name, "down")

    def mend(self, name: str) -> None:
        """Put it in again."""
        self._ip("link", "set", name, "up")

    def _add(self, name: str, address: str, hold: str, environment: dict[str, str]) -> None:
        holder = _held(["--net", "--uts", "--mount"], hold, environment)
        self.holders.append(holder)
        host = Host(name, address, holder.pid)
        self.hosts.append(host)
        self._ip("link", "add", name, "type", "veth", "peer", "name", INTERFACE, "netns", str(holder.pid))
        self._ip("link", "set", name, "master", "bridge", "up")
        for command in (
            ["link", "set", "lo", "up"],
            ["addr", "add", f"{address}/24", "dev", INTERFACE],
            ["link", "set", INTERFACE, "up"],
        ):
            subprocess.run(host.command(["ip", *command], Path("/")), check=True)

    def _ip(self, *arguments: str) -> None:
        """`ip` on the host of the bridge."""
        enter = ["nsenter", f"--target={self.switch.pid}", "--net"]
        subprocess.run([*enter, "ip", *arguments], check=True)


def _held(namespaces: list[str], shell: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process in namespaces of its own, which are there when this returns."""
    process = subprocess.Popen(
        ["unshare", *namespaces, "sh", "-c", shell], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise OSError(f"unshare {' '.join(namespaces)} failed: namespaces need CAP_SYS_ADMIN")
    return process
