"""The ranks' output: files of the run folder, whose error lines are shown on the launcher's stderr as they come."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_rlt.launch.started_rank import Output


class RankLogs:
    """What the ranks of one start write. The first rank's stdout is the command's."""

    def __init__(self, folder: Path, world_size: int) -> None:
        """`folder`: of this start alone."""
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [
            Output(folder / f"rank-{rank}.out" if rank > 0 else None, folder / f"rank-{rank}.err")
            for rank in range(world_size)
        ]
        self._shown = [0] * world_size  # bytes of each rank's error file

    def show(self, *, to_the_end: bool = False) -> None:
        """Show new error lines under their rank; `to_the_end`: also a last one that is incomplete."""
        for rank, output in enumerate(self.outputs):
            text = self._new_text(rank, output, to_the_end=to_the_end)
            sys.stderr.write("".join(f"rank {rank}: {line}\n" for line in text.splitlines()))
        sys.stderr.flush()

    def _new_text(self, rank: int, output: Output, *, to_the_end: bool) -> str:
        file = output.stderr
        if file is None or not file.exists():
            return ""
        with file.open("rb") as opened:
            opened.seek(self._shown[rank])
            new = opened.read()
        complete = new if to_the_end else new[: new.rfind(b"\n") + 1]
        self._shown[rank] += len(complete)
        return complete.decode(errors="replace")
