"""The table of `parity` where no terminal says how wide it is: 80 columns, exponents and all."""

from __future__ import annotations

import io

from rich.console import Console

from megatron_rlt.jobs.parity.gaps import LogprobDiff, print_gaps


def test_differences_keep_their_exponents_in_80_columns() -> None:
    gaps = [
        LogprobDiff(
            *(model, ("transformers", "vllm prompt"), 16_777_216, 4.77e-7, 2.35e-6, 9.35e2),
            *("[p]", 3, "x", "y", (-1.0, -936.0)),
        )
        for model in ("teacher", "students.extra.second")
    ]
    output = io.StringIO()
    print_gaps(gaps, max_gap=1e-3, console=Console(file=output, width=80))
    text = output.getvalue()
    for shown in ("transformers - vllm prompt", "16,777,216", "4.77e-07", "2.35e-06", "9.35e+02", "above 0.001"):
        assert text.count(shown) >= len(gaps), shown
    assert "…" not in text
