"""Times by hand: model FLOP over a share of the peak, and a run's own rates in place of shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlt.config.flops import call_flops, causal_pairs
from megatron_rlt.planning.calibration import Calibration, read_calibration
from megatron_rlt.planning.seconds import PhaseSeconds, Shares, step_seconds
from megatron_rlt.planning.work import Work
from tests.planning.plans import GPU, train_work

PEAK = 989.4e12
SHARES = Shares(scoring=0.5, update=0.4)


def _times(work: Work, calibration: Calibration | None = None) -> dict[str, PhaseSeconds]:
    return {one.phase: one for one in step_seconds(work, GPU, SHARES, calibration)}


def test_phases_by_hand(tmp_path: Path) -> None:
    work = train_work(tmp_path)
    found = _times(work)
    # 1,024 sequences of 4,000 tokens, 3,000 rows of logits each, on eight GPUs.
    one = call_flops(work.held[0].shape, num_tokens=4000, num_pairs=causal_pairs(4000), num_rows=3000)
    assert found["student"].seconds == pytest.approx(1024 * one / (0.5 * PEAK * 8))
    assert found["update"].seconds == pytest.approx(3 * 1024 * one / (0.4 * PEAK * 8))
    # 28 layers of 2.5 ms for each of 3,000 tokens; 128 completions a replica decode together.
    assert found["rollout"].seconds == pytest.approx(28 * 0.0025 * 3000)
    # Every 25 steps policy and reference in bfloat16, and 12 bytes a weight, at 2 GB/s.
    assert found["save"].seconds == pytest.approx(7_615_616_512 * (2 * 2 + 12) / 2e9 / 25)
    # In the background only the copies of eight ranks, at 2 GB/s each.
    behind = _times(train_work(tmp_path, "checkpoint.background=true"))
    assert behind["save"].seconds == pytest.approx(found["save"].seconds / 8)


def test_recomputation_pipelines_fp8_and_smaller_batches_cost_time(tmp_path: Path) -> None:
    plain = _times(train_work(tmp_path))
    assert _times(train_work(tmp_path, "teacher.recompute=full"))["update"].seconds == pytest.approx(
        plain["update"].seconds * 4 / 3
    )
    assert _times(train_work(tmp_path, "student.fp8={}"))["student"].seconds == pytest.approx(
        plain["student"].seconds / 1.2
    )
    # 1,024 / 2 sequences a replica in packs of four: 128 packs pass four stages in 131 turns.
    piped = _times(train_work(tmp_path, "teacher.layout={pp: 4}"))
    assert piped["update"].seconds == pytest.approx(plain["update"].seconds * (1 + 3 / 128))
    assert _times(train_work(tmp_path, "rollout.max_batch_size=64"))["rollout"].seconds == pytest.approx(
        2 * plain["rollout"].seconds
    )


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """Three steps on two ranks; the first is slow."""
    run = tmp_path / "measured"
    run.mkdir()
    (run / "config.yaml").write_text("world_size: 2\n")
    step = {
        "seconds/update": 10.0,
        "model_flops/update": 4e15,
        "seconds/reward": 0.5,
        "seconds/rollout": 50.0,
        "completion_tokens": 500.0,
        "prompt_tokens": 100.0,
    }
    slow = step | {"seconds/update": 60.0, "seconds/reward": 9.0}
    lines = [slow, step, step | {"seconds/reward": 1.5}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run / "metrics.jsonl"


def test_a_runs_own_rates_replace_shares(tmp_path: Path, metrics: Path) -> None:
    known = read_calibration(metrics)
    assert known.flops_per_second_of_rank == {"update": 2e14}
    assert known.fixed_seconds == {"reward": 1.0}
    assert (known.prompt_tokens, known.completion_tokens, known.seconds_per_decoded_token) == (100.0, 500.0, 0.1)
    plain, found = _times(train_work(tmp_path)), _times(train_work(tmp_path), known)
    assert found["update"].seconds == pytest.approx(plain["update"].model_flops / (2e14 * 8))
    assert found["update"].ground == "from metrics.jsonl"
    assert found["student"] == plain["student"], "no rate of it was measured"
    assert found["rollout"].seconds == pytest.approx(3000 * 0.1)
    assert found["reward"].seconds == 1.0


@pytest.mark.parametrize(("text", "fault"), [("", "holds no step"), ("{}\nno\n", "line 2: no JSON object")])
def test_metrics_that_cannot_be_read_are_refused(metrics: Path, text: str, fault: str) -> None:
    metrics.write_text(text)
    with pytest.raises(ValueError, match=fault):
        read_calibration(metrics)
