"""The command under everything that ends it: at the next start it goes on, and ends as if nothing had happened.

One run folder lives through a killed rank, a killed job, a kill in the middle of a save, SIGTERM, SIGUSR1 and an
altered checkpoint, ends, is started again and is prolonged; another runs undisturbed. Moments are random and seeded.
"""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest

from megatron_rlt.checkpoint.folders import list_checkpoints
from tests.distributed.commands import Attempt, Command, half_written, newest_step, step_of
from tests.distributed.tiny_runs import ENDED_EARLY, RL_CONFIG, SMALL_RL, TinyInputs
from tools.chaos.outcome import hashes, outcome

NUM_STEPS, PROLONGED, INTERVAL = 16, 18, 3
_NOT_RESULTS = ("run.json", "logs/", "tensorboard/")


def _settings(inputs: TinyInputs, num_steps: int) -> list[str]:
    reference = ["grpo.reference.beta=0.1", "grpo.reference.sync_steps=4"]
    return [
        *SMALL_RL,
        *inputs.for_train,
        *reference,
        f"num_steps={num_steps}",
        f"checkpoint.interval_steps={INTERVAL}",
    ]


def _start(inputs: TinyInputs, folder: Path, *, num_steps: int = NUM_STEPS) -> Command:
    return Command("train", RL_CONFIG, _settings(inputs, num_steps), folder)


class Life:
    """The disturbed run: what every start of it saw, by name, and its files when it had ended twice."""

    def __init__(self, inputs: TinyInputs, folder: Path) -> None:
        rng = random.Random(0)
        self.folder = folder
        self.attempts: dict[str, Attempt] = {}
        self.attempts["rank killed"] = _start(inputs, folder).after_steps(rng.randint(4, 5), rng).kill_rank(1).finish()
        self.attempts["job killed"] = _start(inputs, folder).after_steps(rng.randint(1, 2), rng).kill().finish()
        self.attempts["killed in a save"] = _start(inputs, folder).kill_while_it_saves().finish()
        self.half_written = half_written(folder)
        told = _start(inputs, folder).after_steps(rng.randint(1, 2), rng).tell(signal.SIGTERM)
        self.attempts["SIGTERM"] = told.finish()
        self.step_saved_for_sigterm = newest_step(folder)
        told = _start(inputs, folder).after_steps(rng.randint(1, 2), rng).tell(signal.SIGUSR1)
        self.attempts["SIGUSR1"] = told.finish()
        self.step_saved_for_sigusr1 = newest_step(folder)
        self.altered, self.intact = _alter_newest(folder)
        self.attempts["altered"] = _start(inputs, folder).finish()
        shutil.rmtree(self.altered.parents[2])  # as the refusal says
        self.attempts["finished"] = _start(inputs, folder).finish()
        self.files = self._results()
        self.attempts["again"] = _start(inputs, folder).finish()
        self.files_again = self._results()
        self.attempts["prolonged"] = _start(inputs, folder, num_steps=PROLONGED).finish()

    def _results(self) -> dict[str, str]:
        return hashes(self.folder, keep=lambda name: not name.startswith(_NOT_RESULTS))


def _alter_newest(folder: Path) -> tuple[Path, Path]:
    """Flip one bit of the newest checkpoint's weights; the altered file, and the checkpoint before."""
    previous, newest = list_checkpoints(folder / "checkpoints")
    weights = next((newest / "models" / "policy").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    return weights, previous


@pytest.fixture(scope="module")
def undisturbed(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    attempt = _start(inputs, folder, num_steps=PROLONGED).finish()
    assert attempt.status == 0, attempt.errors
    return folder


@pytest.fixture(scope="module")
def life(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Life:
    return Life(inputs, tmp_path_factory.mktemp("disturbed") / "run")


@pytest.mark.slow
def test_the_disturbed_run_equals_the_undisturbed_one_bit_for_bit(life: Life, undisturbed: Path) -> None:
    disturbed, expected = outcome(life.folder), outcome(undisturbed)
    assert [step["step"] for step in disturbed.metrics] == list(range(1, PROLONGED + 1))
    assert disturbed.metrics == expected.metrics
    assert disturbed.weights == expected.weights
    assert disturbed.completions == expected.completions


@pytest.mark.slow
def test_every_start_goes_on_at_the_newest_checkpoint(life: Life) -> None:
    started = {name: attempt for name, attempt in life.attempts.items() if name not in ("altered", "again")}
    assert {name: attempt.first_step for name, attempt in started.items()} == {
        name: attempt.found_step + 1 for name, attempt in started.items()
    }
    assert started["rank killed"].found_step == 0
    assert started["job killed"].found_step in range(INTERVAL, NUM_STEPS, INTERVAL)


@pytest.mark.slow
def test_a_killed_rank_ends_the_command_with_status_1_and_is_named(life: Life) -> None:
    attempt = life.attempts["rank killed"]
    assert attempt.status == 1
    assert "rank 1 failed in phase " in attempt.errors
    assert "killed by SIGKILL" in attempt.errors
    assert life.attempts["job killed"].status == -signal.SIGKILL


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_leaves_no_checkpoint_of_that_step(life: Life) -> None:
    assert len(life.half_written) == 1
    assert life.attempts["killed in a save"].status == -signal.SIGKILL
    assert life.attempts["SIGTERM"].found_step < life.attempts["killed in a save"].last_metrics_step
    assert half_written(life.folder) == []


@pytest.mark.slow
def test_sigterm_and_sigusr1_save_at_the_next_step_and_end_with_status_75(life: Life) -> None:
    sigterm, sigusr1 = life.attempts["SIGTERM"], life.attempts["SIGUSR1"]
    assert (sigterm.status, sigusr1.status) == (ENDED_EARLY, ENDED_EARLY)
    assert life.step_saved_for_sigterm == sigterm.last_metrics_step == sigusr1.found_step < NUM_STEPS
    assert life.step_saved_for_sigusr1 == sigusr1.last_metrics_step == life.attempts["altered"].found_step < NUM_STEPS
    assert sigterm.last_metrics_step > sigterm.found_step
    assert "Traceback" not in sigterm.errors + sigusr1.errors


@pytest.mark.slow
def test_a_finished_run_started_again_changes_nothing(life: Life) -> None:
    assert life.attempts["finished"].status == life.attempts["again"].status == 0
    assert life.attempts["again"].first_step is None
    assert life.files_again == life.files
    assert {"metrics.jsonl", "hf/model.safetensors", "config.yaml"} < set(life.files)


@pytest.mark.slow
def test_raising_num_steps_continues_and_replaces_the_exported_weights(life: Life) -> None:
    attempt = life.attempts["prolonged"]
    assert (attempt.status, attempt.first_step, attempt.last_metrics_step) == (0, NUM_STEPS + 1, PROLONGED)
    exported = hashes(life.folder / "hf")
    assert exported["model.safetensors"] != life.files["hf/model.safetensors"]
    assert exported.keys() == {name.removeprefix("hf/") for name in life.files if name.startswith("hf/")}


@pytest.mark.slow
def test_an_altered_checkpoint_is_refused_by_name_and_the_previous_one_offered(life: Life) -> None:
    refused = life.attempts["altered"]
    assert (refused.status, refused.first_step) == (2, None)
    assert refused.errors.count("megatron-rlt: error: ") == 1
    assert f"{life.altered} was altered" in refused.errors
    assert f"{life.intact} is intact: to resume from it, remove {life.altered.parents[2]}" in refused.errors
    assert "Traceback" not in refused.errors
    assert life.attempts["finished"].found_step == step_of(life.intact) < refused.found_step


@pytest.mark.slow
def test_a_folder_that_holds_another_run_is_refused_and_left_as_it_is(undisturbed: Path, inputs: TinyInputs) -> None:
    before = hashes(undisturbed)
    one_rank = ["world_size=1", "teacher.layout={tp: 1, sp: false}"]
    other = Command("train", RL_CONFIG, [*_settings(inputs, PROLONGED), *one_rank, "seed=1"], undisturbed).finish()
    assert other.status == 2
    assert f"output_dir {undisturbed} holds one with another configuration: seed was 0, now 1" in other.errors
    assert hashes(undisturbed) == before
