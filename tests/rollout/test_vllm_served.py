"""A rollout that was interrupted keeps what was answered, and asks for the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.rollout import VllmConfig, VllmServerConfig
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.rollout.vllm.client import EngineLostError
from megatron_rlt.rollout.vllm.servers import ServedEngine
from megatron_rlt.rollout.vllm.settings import EngineShape, Sampling
from tests.ranks import run_ranks
from tests.rollout.test_vllm_server import FakeServer, choice
from tests.tiny_models import tiny_hf_model


class AtThree:
    """Ends a completion at id 3."""

    stop_ids = (3,)
    end_tag = None

    def __call__(self, sampled_ids: Sequence[int]) -> bool:
        return sampled_ids[-1] == 3


def _engine(fake: FakeServer, folder: Path) -> ServedEngine:
    fake.answers["/v1/models"] = (200, {"data": [{"id": "policy", "max_model_len": 128}]})
    server = VllmServerConfig(addresses=(fake.address,), max_retries=0)
    shape = EngineShape(folder, "float32", 1, 128, 16, 64, VllmConfig(), on_gpu=False)
    sampling = Sampling(1.0, 1.0, 131, 131, 8, AtThree())
    return ServedEngine(shape, Architecture.from_folder(folder), sampling, server=server, folder=folder / "run")


def interrupt(folder: Path, version_after: int) -> tuple[Counter[int], list[tuple[int, int]]]:
    """The second question fails once, and the policy may have changed until it is asked again.

    Returns:
        How often each question was asked until all were answered, by its prompt's id; seeds and versions of all
        completions.
    """
    fake, failures = FakeServer(), iter([500])

    def answer(body: Any) -> tuple[int, Any]:
        if body["prompt"] == [2] and next(failures, None):
            return 500, None
        return 200, {"choices": [choice(0, [3]), choice(1, [4, 3])]}

    fake.answers = dict.fromkeys(("/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache"), (200, None))
    fake.answers |= dict.fromkeys(("/update_weight_version", "/resume", "/health"), (200, None))
    fake.answers["/v1/completions"] = answer
    engine = _engine(fake, folder)
    requests = [SampleRequest(torch.tensor([prompt]), 10 * prompt + member) for prompt in (1, 2) for member in (0, 1)]

    def load(version: int) -> None:
        engine.load_weights([("weight", torch.zeros(1))], version)
        fake.answers["/weight_info"] = (200, {"weight_version": str(version)})

    load(0)
    engine.start(requests, 0, [range(4)])
    with pytest.raises(EngineLostError):
        engine.arrivals()
    load(version_after)
    engine.ask_again(version_after)
    (arrival,) = engine.arrivals()
    asked = Counter(body["prompt"][0] for path, body, _ in fake.asked if path == "/v1/completions")
    fake.close()
    return asked, [(one.seed, one.policy_version) for one in arrival.completions]


def test_only_what_was_not_answered_is_asked_again_and_says_by_which_weights(tmp_path: Path) -> None:
    folder = tiny_hf_model(tmp_path / "model", "qwen2", tied=False)
    for version in (0, 1):
        ((asked, completions),) = run_ranks(interrupt, 1, folder, version)
        assert asked == {1: 1, 2: 2}
        assert completions == [(10, 0), (11, 0), (20, version), (21, version)]


def ask_a_question_twice(folder: Path) -> list[tuple[int, list[int]]]:
    """One prompt in two parts of a batch; part and seeds of what comes."""
    fake = FakeServer()
    fake.answers["/weight_info"] = (200, {"weight_version": "0"})
    fake.answers["/v1/completions"] = lambda body: (200, {"choices": [choice(i, [3]) for i in range(body["n"])]})
    engine = _engine(fake, folder)
    requests = [SampleRequest(torch.tensor([5, 6]), seed) for seed in range(6)]
    engine.start(requests, 0, [range(2), range(2, 6)])
    come: list[tuple[int, list[int]]] = []
    while arrivals := engine.arrivals():
        come += [(one.part, [completion.seed for completion in one.completions]) for one in arrivals]
    fake.close()
    return sorted(come)


def test_a_question_that_a_batch_has_twice_belongs_to_both_of_its_parts(tmp_path: Path) -> None:
    folder = tiny_hf_model(tmp_path / "model", "qwen2", tied=False)
    assert run_ranks(ask_a_question_twice, 1, folder) == [[(0, [0, 1]), (1, [2, 3, 4, 5])]]
