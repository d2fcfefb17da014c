"""A weight sync into a dense transformers model: all tensors arrive in every layout, and each proof finds its fault."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rlt.config.models import LayoutConfig, ScoringConfig
from megatron_rlt.models.checksum import checksums_held
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.rollout.weight_sync.sync import SyncReport, WeightSync
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Span, SpannedSequence, StoppedError
from tests.models.loading import loaded_model
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

LAYOUTS = (
    LayoutConfig(tp=2, sp=True),
    LayoutConfig(pp=2),
    LayoutConfig(cp=2),
    LayoutConfig(),
)


class DenseReceiver:
    """A sampling engine's side of a sync, played by transformers with another start than the policy."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.names: list[str] = []
        self.ignores: set[str] = set()  # names it keeps its own values of
        self.noise = 0.0  # added to its log-probs

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        held = dict(self.model.named_parameters())
        self.names = []
        for name, tensor in tensors:
            self.names.append(name)
            if name in held and name not in self.ignores:
                held[name].data.copy_(tensor)

    def checksums_held(self, names: Sequence[str]) -> list[dict[str, str]]:
        return [checksums_held(self.model, list(names))]

    def prompt_logprobs(self, token_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor([token_ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(self.model(ids).logits[0, :-1], dim=-1)
        found: Tensor = logprobs.gather(1, ids[0, 1:, None])[:, 0][None] + self.noise
        return found


def sync_to_dense(
    folder: Path, start: Path, config: LayoutConfig, faults: Mapping[str, Any]
) -> tuple[list[SyncReport], list[str], str | None]:
    """Three syncs with a change of the policy before each; `faults` are set before the last. What it was told."""
    layout = build_layout(config)
    model = loaded_model(folder, layout, torch.float32)
    ask = LogprobEngine(
        model, temperature=1.0, scoring=ScoringConfig(max_tokens_per_pack=512, row_block=64, vocab_block=512)
    )
    receiver = DenseReceiver(start)
    sync = WeightSync(
        model,
        receiver,
        trainer_logprobs=lambda ids: ask.logprobs([SpannedSequence(ids, (Span(1, len(ids)),))]).values[0],
        num_token_ids=model.unpadded_vocab_size,
        max_probe_gap=1e-3,
    )
    reports: list[SyncReport] = []
    try:
        for version in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.97)
            if version == 2:
                for name, value in faults.items():
                    setattr(receiver, name, value)
            reports.append(sync.push(version))
    except StoppedError as error:
        return reports, receiver.names, str(error)
    return reports, receiver.names, None


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Path]]:
    """By whether embeddings are tied: the policy, and another start."""
    folder = tmp_path_factory.mktemp("models")
    return {
        tied: tuple(tiny_hf_model(folder / f"{tied}-{seed}", "qwen2", tied=tied, seed=seed) for seed in (0, 1))
        for tied in (False, True)
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", LAYOUTS, ids=str)
def test_every_sync_brings_the_policys_log_probs_in_every_layout(
    folders: dict[bool, tuple[Path, Path]], config: LayoutConfig, tied: bool
) -> None:
    folder, start = folders[tied]
    size = sum(tensor.nbytes for tensor in AutoModelForCausalLM.from_pretrained(folder).parameters())
    for reports, names, told in run_ranks(sync_to_dense, 2, folder, start, config, {}):
        assert told is None
        assert [report.num_bytes for report in reports] == [size] * 3
        assert all(report.probe_gap < 1e-4 and report.seconds > 0 for report in reports)
        # vLLM's CPU build packs the output layer of a tied model apart: it has to be told of it under its own name.
        assert names.count("lm_head.weight") == 1
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ({"noise": 0.01}, "differ by 0.01 nats"),
        ({"noise": float("nan")}, "differ by nan nats"),
        ({"ignores": {"model.norm.weight"}}, "model.norm.weight (and 0 more of "),
    ],
    ids=["too far", "no number", "one tensor kept"],
)
def test_a_sync_whose_engine_is_not_at_the_policys_weights_stops_every_rank(
    folders: dict[bool, tuple[Path, Path]], faults: dict[str, Any], told: str
) -> None:
    folder, start = folders[False]
    for reports, _, line in run_ranks(sync_to_dense, 2, folder, start, LayoutConfig(tp=2), faults):
        assert len(reports) == 2
        assert line is not None
        assert line.startswith("weight sync to policy version 2: ")
        assert told in line
        assert line.endswith("no completion was sampled")


def stale_sync(folder: Path) -> str | None:
    """The second sync changes the policy by less than the bound, and its engine answers as before."""
    layout = build_layout(LayoutConfig())
    model = loaded_model(folder, layout, torch.float32)
    ask = LogprobEngine(
        model, temperature=1.0, scoring=ScoringConfig(max_tokens_per_pack=512, row_block=64, vocab_block=512)
    )

    def trainer(ids: Tensor) -> Tensor:
        return ask.logprobs([SpannedSequence(ids, (Span(1, len(ids)),))]).values[0]

    class Cached(DenseReceiver):
        """Answers every time as the first time, like a prefix cache that outlives its weights."""

        first: Tensor | None = None

        def prompt_logprobs(self, token_ids: Sequence[int]) -> Tensor:
            self.first = super().prompt_logprobs(token_ids) if self.first is None else self.first
            return self.first

    sync = WeightSync(model, Cached(folder), trainer_logprobs=trainer, num_token_ids=131, max_probe_gap=1.0)
    sync.push(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.999)
    try:
        sync.push(1)
    except StoppedError as error:
        return str(error)
    return None


def test_an_engine_that_still_answers_with_the_weights_before_is_found_below_the_bound(
    folders: dict[bool, tuple[Path, Path]],
) -> None:
    (line,) = run_ranks(stale_sync, 1, folders[False][0])
    assert line is not None
    assert "are those of the version before" in line
