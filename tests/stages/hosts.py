"""Two hosts of one machine: network namespaces that reach each other by one cable, over the file system that they share."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from stages.ranks import LONGEST_S
from stages.tiny import environment

CABLE, PORT = "qtip0", 29511
"""The name of both ends of the cable, and where the processes of the first host are met."""


class Hosts:
    """Two of them, by the names of their namespaces; `address` is the first one's."""

    def __init__(self, names: Sequence[str], address: str) -> None:
        self.names, self.address = names, address

    def torchrun(self, each: int, where: Path, arguments: Sequence[Any]) -> list[tuple[int, str]]:
        """(exit status, what was written) of torchrun with `each` processes on both hosts."""
        started = []
        for rank, name in enumerate(self.names):
            meeting = ("--nnodes", "2", "--node_rank", rank, "--master_addr", self.address, "--master_port", PORT)
            command = ["ip", "netns", "exec", name, Path(sys.executable).parent / "torchrun", *meeting]
            command += ["--nproc_per_node", each, "-m", "qtipcli", *arguments]
            surroundings = environment() | {"GLOO_SOCKET_IFNAME": CABLE}
            started.append(
                subprocess.Popen(
                    list(map(str, command)),
                    cwd=where,
                    env=surroundings,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        try:
            return [
                (process.returncode, said) for process in started for said in [process.communicate(timeout=2 * LONGEST_S)[0]]
            ]
        finally:
            for process in started:
                process.kill()


def _ip(*arguments: object) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Skips the test where namespaces are not allowed; takes them away afterwards."""
    names = [f"qtip-{os.getpid()}-{number}" for number in (1, 2)]
    addresses = ["10.221.0.1", "10.221.0.2"]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
            for name, address in zip(names, addresses, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
                for device in ("lo", CABLE):
                    _ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', error)!r}")
        yield Hosts(names, addresses[0])
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
