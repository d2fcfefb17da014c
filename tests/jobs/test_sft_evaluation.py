"""`sft` with held-out rows: the loss is transformers' on the weights of that step, and training is what it was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.commands import Command
from tests.distributed.tiny_runs import (
    ENDED_EARLY,
    SCORER_CONFIG,
    SMALL_SFT,
    TinyInputs,
    sft_here,
    tiny_inputs,
)
from tests.jobs.test_sft import TEXTS, dense_loss
from tests.ranks import run_ranks
from tools.chaos.outcome import Outcome, outcome
from tools.demo.make_assets import make_assets

NUM_HELD_OUT = 7  # an uneven share for two replicas
_OF_EVALUATION = ("evaluation_loss", "tokens/evaluation", "model_flops/evaluation")
LAYOUTS = {"tp2": "{tp: 2, sp: true}", "pp2": "{pp: 2}"}


@dataclass(frozen=True)
class Runs:
    """Runs on the same rows, by name, and what a row without a trace brought."""

    folder: Path
    inputs: TinyInputs
    held_out: Path
    message: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("evaluated")
    inputs = tiny_inputs(folder, num_rows=10)
    held_out = make_assets(folder / "other", seed=1, num_rows=NUM_HELD_OUT).train
    no_trace = folder / "no_trace.jsonl"
    no_trace.write_text(held_out.read_text() + '{"id": "bare", "question": "5", "solution": "3"}\n')
    messages = run_ranks(_train_all, 2, folder, [*SMALL_SFT, *inputs.for_sft], held_out, no_trace)
    assert messages[0] == messages[1]
    return Runs(folder, inputs, held_out, messages[0])


def _train_all(folder: Path, settings: list[str], held_out: Path, no_trace: Path) -> str:
    five = [*settings, "num_steps=5"]
    evaluated = [*five, f"evaluation={{data: {held_out}, interval_steps: 2}}"]
    assert sft_here(folder / "plain", five) == 0
    assert sft_here(folder / "whole", evaluated) == 0
    assert sft_here(folder / "stopped", evaluated, stop_after=2) == ENDED_EARLY
    assert sft_here(folder / "stopped", evaluated) == 0
    for name, layout in LAYOUTS.items():
        once = ["num_steps=1", f"model.layout={layout}", f"evaluation.data={held_out}"]
        assert sft_here(folder / name, [*settings, *once]) == 0
    with pytest.raises(ValueError, match="bare") as refusal:
        sft_here(folder / "refused", [*five, f"evaluation.data={no_trace}"])
    return str(refusal.value)


def test_it_is_evaluated_at_the_interval_and_after_the_last_step(runs: Runs) -> None:
    assert [step["step"] for step in outcome(runs.folder / "whole").metrics if "evaluation_loss" in step] == [2, 4, 5]


def test_the_evaluation_loss_is_the_cross_entropy_of_all_wanted_tokens_in_every_layout(runs: Runs) -> None:
    rows = [json.loads(line) for line in runs.held_out.read_text().splitlines()]
    assert len(rows) == NUM_HELD_OUT
    for name in ("whole", *LAYOUTS):
        loss, _ = dense_loss(runs.folder / name / "hf", [TEXTS["student"].format(**row) for row in rows])
        last = outcome(runs.folder / name).metrics[-1]
        assert last["evaluation_loss"] == pytest.approx(loss, abs=1e-5), name


def test_training_is_bit_equal_with_and_without_evaluation(runs: Runs) -> None:
    whole, plain = outcome(runs.folder / "whole"), outcome(runs.folder / "plain")
    assert _without_evaluation(whole) == plain.metrics
    assert whole.weights == plain.weights


def test_an_evaluated_run_that_was_stopped_and_resumed_equals_a_whole_one(runs: Runs) -> None:
    stopped: Outcome = outcome(runs.folder / "stopped")
    assert stopped == outcome(runs.folder / "whole")


def test_a_held_out_row_without_a_trace_is_refused_by_name(runs: Runs) -> None:
    assert "problem bare has no reasoning_trace to train on; drop the row or add one" in runs.message
    assert not (runs.folder / "refused" / "metrics.jsonl").exists()


def test_held_out_data_without_rows_is_one_line_and_bad_input(runs: Runs) -> None:
    empty = runs.folder / "empty.jsonl"
    empty.write_text("")
    settings = [*SMALL_SFT, *runs.inputs.for_sft, f"evaluation.data={empty}"]
    attempt = Command("sft", SCORER_CONFIG, settings, runs.folder / "empty").finish()
    assert attempt.status == 2
    assert f"megatron-rlt: error: no usable row in {empty}: it has no rows" in attempt.errors.splitlines()


def _without_evaluation(run: Outcome) -> list[dict[str, Any]]:
    return [{name: value for name, value in step.items() if name not in _OF_EVALUATION} for step in run.metrics]
