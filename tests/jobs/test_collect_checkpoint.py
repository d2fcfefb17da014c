"""A teacher may be a training checkpoint: it explains as its export does, and an altered one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlt.checkpoint.rank_state import RankState
from megatron_rlt.checkpoint.saving import capture_training_state, write_training_state
from megatron_rlt.checkpoint.training_state import SharedState
from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.models import LayoutConfig, ModelConfig, ScoringConfig
from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.config.training import OptimizerConfig, Reshardable
from megatron_rlt.jobs.run.load_models import load_model
from megatron_rlt.jobs.sft import sft_update
from megatron_rlt.models.weights.export import save_hf_folder
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.parallel.platform import world
from megatron_rlt.policy.policy import Policy
from megatron_rlt.prompts.pairs import teacher_format
from megatron_rlt.types import Problem, tell_nobody
from tests.jobs.tiny_collect import CollectInputs, collect_inputs, collect_on_ranks, rows_of
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> CollectInputs:
    return collect_inputs(tmp_path_factory.mktemp("collect"))


def _train(source: Path, prompts: PromptConfig, folder: Path, reshardable: Reshardable) -> None:
    """One step that moves every weight, saved as a checkpoint and as a Hugging Face folder, by two stages."""
    policy = Policy(
        load_model(ModelConfig(model=source, dtype="float32"), build_layout(LayoutConfig(pp=2))),
        optimizer=OptimizerConfig(lr=0.02),
        blocks=ScoringConfig(),
        temperature=1.0,
        max_tokens_per_pack=16384,
        micro_batch_size=1,
        num_updates=1,
        on_progress=tell_nobody,
    )
    problem = Problem("a", "What is three and four?", "7", reasoning_trace="First we add the numbers.")
    sft_update(policy, [teacher_format(source, prompts).sft_sequence(problem)])
    captured = capture_training_state(
        1,
        models={"policy": policy.model},
        optimizer=policy.optimizer,
        scheduler=policy.scheduler,
        rank_state=RankState.capture(extra=b""),
        shared_state=SharedState(b"", {}),
        num_updates=1,
        reshardable=reshardable,
        copy=False,
    )
    write_training_state(captured, folder / "checkpoints", keep_last=1, group=world())
    save_hf_folder(policy.model, source, folder / "hf", max_shard_bytes=10**9)


def _collect(config: CollectConfig) -> str:
    try:
        collect_on_ranks(config)
        return ""
    except ValueError as error:
        return str(error)


def test_a_checkpoint_explains_as_its_export_does(inputs: CollectInputs, tmp_path: Path) -> None:
    """Its optimizer is in the parts of two ranks: the weights can be read by one all the same."""
    run_ranks(_train, 2, inputs.teacher, inputs.config(tmp_path).prompts, tmp_path, "tp_pp")
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    exported = inputs.config(
        tmp_path / "exported", teacher={"model": tmp_path / "hf", "dtype": "float32"}, student=None
    )
    loaded = inputs.config(tmp_path / "loaded", teacher_checkpoint=checkpoint, student=None)
    untrained = inputs.config(tmp_path / "untrained", student=None)
    for config in (exported, loaded, untrained):
        assert run_ranks(_collect, 1, config) == [""]
    ids = [[row["completion_ids"] for row in rows_of(c, "unscored")] for c in (exported, loaded, untrained)]
    assert ids[0] == ids[1] != ids[2]
    assert {row["teacher"] for row in rows_of(loaded, "unscored")} == {str(checkpoint)}
    prints = [{row["teacher_fingerprint"] for row in rows_of(c, "unscored")} for c in (loaded, untrained)]
    assert prints[0].isdisjoint(prints[1])

    altered = next((checkpoint / "models" / "policy").glob("*.distcp"))
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    (said,) = run_ranks(_collect, 1, inputs.config(tmp_path / "altered", teacher_checkpoint=checkpoint, student=None))
    assert said.startswith(f"a checkpoint must be as it was saved; {altered} was altered")


def test_a_checkpoint_of_another_architecture_is_refused(inputs: CollectInputs, tmp_path: Path) -> None:
    run_ranks(_train, 2, inputs.student, inputs.config(tmp_path).prompts, tmp_path, "full")
    config = inputs.config(tmp_path / "run", teacher_checkpoint=tmp_path / "checkpoints" / "step-000001", student=None)
    (said,) = run_ranks(_collect, 1, config)
    assert "step-000001 holds the weights of another architecture; name the model that its run began with" in said
