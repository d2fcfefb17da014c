"""`mismatch.max_rollout_gap` by the real command: a bound too small stops the run, a larger one lets it go on."""

from __future__ import annotations

from pathlib import Path

from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.store.worst_completions import read_worst_completions
from tests.distributed.commands import Command
from tests.distributed.tiny_runs import RL_CONFIG, SMALL_RL, TinyInputs


def test_a_gap_above_the_bound_stops_the_run_before_its_update_and_a_larger_bound_resumes_it(
    tmp_path: Path, inputs: TinyInputs
) -> None:
    settings = [*SMALL_RL, *inputs.for_train, "num_steps=1", "checkpoint.export=[]"]
    run = tmp_path / "run"
    stopped = Command("train", RL_CONFIG, [*settings, "mismatch.max_rollout_gap=1e-12"], run).finish()
    assert stopped.status == 1
    (line,) = stopped.errors.splitlines()
    (worst,) = read_worst_completions(run)
    assert line.startswith("megatron-rlt: error: step 1: ")
    found = (f"differ by {worst['gap']:.3g} ", "mismatch.max_rollout_gap=1e-12", f"of problem {worst['problem_id']};")
    causes = ("temperature mode (engine 1, trainer 1", "dtype", "stale weights", "prefix cache")
    assert [word for word in (*found, *causes) if word not in line] == []
    assert 1e-12 < worst["gap"] < 1e-4
    assert read_metrics(run) == []
    assert not (run / "checkpoints").exists()

    resumed = Command("train", RL_CONFIG, [*settings, "mismatch.max_rollout_gap=1e-3"], run).finish()
    assert resumed.status == 0, resumed.errors
    assert read_worst_completions(run) == [worst], "the same step, recorded once"
    (step,) = read_metrics(run)
    assert step["rollout_gap_max"] == worst["gap"]
