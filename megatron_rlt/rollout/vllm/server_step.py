"""The folder through which a job's trainer and the vLLM servers of its own Slurm step find each other.

    key                     the key that every server demands; the job's script makes it
    node-N.json             what node N of the step serves: for each of its servers the address, and which start it is
    lost-N-PLACE-START      the trainer lost this server: its node starts another in its place
    failed                  why the step cannot go on; whoever waits for a server reads it and ends

All files are of mode 0600, and written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.config.server_access import read_key
from megatron_rlt.given_files import read_text
from megatron_rlt.whole_files import write_text

_OURS = "the job's own servers wrote it: start the job again"
_FAILED = "failed"


@dataclass(frozen=True)
class StepServer:
    """One server of a step's node, at its place among that node's."""

    node: int
    place: int
    start: int  # how many servers were started at this place, this one included
    address: str | None  # None: it does not answer yet


@dataclass(frozen=True)
class StepFolder:
    """Reads and writes the files."""

    folder: Path

    def key(self) -> str:
        """The key; raises ValueError if there is none."""
        return read_key(self.folder / "key")

    def announce(self, node: int, servers: Sequence[StepServer]) -> None:
        """Say what a node serves now."""
        rows = [{"start": one.start, "address": one.address} for one in servers]
        write_text(self._node_file(node), json.dumps(rows) + "\n")

    def servers(self, node: int) -> tuple[StepServer, ...] | None:
        """What a node serves; None: it has not said anything yet."""
        file = self._node_file(node)
        if not file.is_file():
            return None
        rows = json.loads(read_text(file, remedy=_OURS))
        return tuple(StepServer(node, place, row["start"], row["address"]) for place, row in enumerate(rows))

    def give_up(self, server: StepServer) -> None:
        """Ask the server's node to start another in its place."""
        write_text(self._lost_file(server), "")

    def is_given_up(self, server: StepServer) -> bool:
        """Whether the trainer has lost this start of the server."""
        return self._lost_file(server).is_file()

    def fail(self, why: str) -> None:
        """Say why the step cannot go on; the first reason stays."""
        if self.failure() is None:
            write_text(self.folder / _FAILED, why + "\n")

    def failure(self) -> str | None:
        """Why the step cannot go on; None: it goes on."""
        file = self.folder / _FAILED
        return read_text(file, remedy=_OURS).strip() if file.is_file() else None

    def _node_file(self, node: int) -> Path:
        return self.folder / f"node-{node}.json"

    def _lost_file(self, server: StepServer) -> Path:
        return self.folder / f"lost-{server.node}-{server.place}-{server.start}"
