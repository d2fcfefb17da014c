"""`sft` trains on the tokens a reader of the formats would name: its first loss equals plain transformers'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rlt.metrics.writer import read_metrics
from tests.distributed.tiny_runs import SMALL_SFT, TinyInputs, sft_here, tiny_inputs
from tests.ranks import run_ranks

NUM_ROWS = 10
TEXTS = {
    "student": "<q> {question} <exp> {reasoning_trace} <sol> {solution} <eos>",
    "teacher": "<q> {question} <sol> {solution} <exp> {reasoning_trace} </exp> <eos>",
}
LAYOUTS = {"student": "{cp: 2}", "teacher": "{tp: 2, sp: true}"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("sft"), num_rows=NUM_ROWS)


def _one_step_as_each_role(folder: Path, settings: list[str]) -> str:
    for role, layout in LAYOUTS.items():
        sft_here(folder / role, [*settings, f"role={role}", f"model.layout={layout}"])
    sft_here(folder / "whole_turn", [*settings, "loss_on=assistant_turn"])
    try:
        sft_here(folder / "too_long", [*settings, "max_tokens=20"])
    except ValueError as error:
        return str(error)
    return "accepted"


def test_the_first_loss_is_the_cross_entropy_of_the_wanted_tokens(tmp_path: Path, inputs: TinyInputs) -> None:
    settings = [*SMALL_SFT, *inputs.for_sft, "num_steps=1", f"global_batch_size={NUM_ROWS}", "micro_batch_size=4"]
    messages = run_ranks(_one_step_as_each_role, 2, tmp_path, settings)

    rows = [json.loads(line) for line in (inputs.model.parent / "train.jsonl").read_text().splitlines()]
    for run, role in (("student", "student"), ("teacher", "teacher"), ("whole_turn", "student")):
        (step,) = read_metrics(tmp_path / run)
        texts = [TEXTS[role].format(**row) for row in rows]
        loss, num_targets = dense_loss(inputs.model, texts, with_opening=run == "whole_turn")
        assert step["loss"] == pytest.approx(loss, abs=1e-5)
        assert step["target_tokens"] == num_targets
    assert len(set(messages)) == 1
    assert "tokens, more than max_tokens = 20; drop the row or raise the limit" in messages[0]
    assert "problem train-0000" in messages[0]


def dense_loss(model_folder: Path, texts: list[str], *, with_opening: bool = False) -> tuple[float, int]:
    """Mean cross-entropy of everything after `<exp>`, or from it on, one text at a time; and the number of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    opening = tokenizer.convert_tokens_to_ids("<exp>")
    losses = []
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        start = ids.tolist().index(opening) + (0 if with_opening else 1)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
        losses.append(-logprobs[start - 1 : -1].gather(1, ids[start:, None])[:, 0])
    joined = torch.cat(losses)
    return float(joined.mean()), len(joined)
