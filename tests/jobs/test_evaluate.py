"""`evaluate` against a dense model, in every layout, and with rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.prompts.tokenizer import load_tokenizer
from megatron_rlt.rewards.countdown_problems import draw_countdown
from megatron_rlt.rollout.sampling import completion_seed, sample, uniforms
from tests.jobs.tiny_evaluations import (
    MAX_COMPLETION_TOKENS,
    QUESTIONS,
    EvaluationInputs,
    evaluate_on_ranks,
    evaluation_inputs,
)
from tests.jobs.tiny_scores import PhaseLog, write_rows
from tests.ranks import run_ranks

COLUMNS = [
    "id", "sample", "question", "completion", "answer", "reference", "correct", "reason", "tokens", "finish_reason",
    "seed",
]  # fmt: skip
GREEDY = {"greedy": True, "num_samples": 1, "max_batch_size": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> EvaluationInputs:
    return evaluation_inputs(tmp_path_factory.mktemp("evaluate"))


class Dense:
    """Completions of transformers' model, one token after the other without a cache."""

    def __init__(self, inputs: EvaluationInputs) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32).eval()
        self._tokenizer = load_tokenizer(inputs.model)

    @torch.no_grad()
    def complete(self, question: str, *, prefill: str, seed: int | None) -> list[int]:
        """Greedy where `seed` is None, else at temperature 1 with that seed's random numbers."""
        messages = [{"role": "user", "content": question}]
        hf = self._tokenizer.hf
        prompt = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = hf.encode(prompt, add_special_tokens=False) + self._tokenizer.encode(prefill)
        start = len(ids)
        while len(ids) - start < MAX_COMPLETION_TOKENS and not (len(ids) > start and ids[-1] == hf.eos_token_id):
            logits = self._model(torch.tensor([ids])).logits[:, -1, : len(hf)]
            token = logits.argmax(-1)
            if seed is not None:
                number = uniforms(torch.tensor([seed]), torch.tensor([len(ids) - start]))
                token, _ = sample(logits, temperature=1.0, top_p=1.0, uniforms=number)
            ids.append(int(token))
        return ids[start:]

    def text(self, ids: list[int]) -> str:
        """Without the end of turn."""
        return self._tokenizer.decode([token for token in ids if token != self._tokenizer.hf.eos_token_id])


@pytest.fixture(scope="module")
def dense(inputs: EvaluationInputs) -> Dense:
    return Dense(inputs)


def _evaluate_all(configs: list[EvaluateConfig]) -> list[int]:
    return [evaluate_on_ranks(config, PhaseLog()) for config in configs]


def _verdicts(config: EvaluateConfig) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(config.output_dir / "verdicts.parquet").to_pylist()
    return rows


def _results(config: EvaluateConfig) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((config.output_dir / "results.json").read_text())
    return results


def test_greedy_verdicts_are_those_of_a_dense_model(inputs: EvaluationInputs, dense: Dense, tmp_path: Path) -> None:
    """Every second question's reference is the last word that the dense model writes."""
    configs, expected = [], []
    for name, prefill in (("prefilled", "<|begin_of_thought|>\n\n"), ("plain", "")):
        completions = [dense.complete(question, prefill=prefill, seed=None) for question in QUESTIONS]
        texts = [dense.text(ids) for ids in completions]
        references = [text.split()[-1] if i % 2 == 0 else "seven" for i, text in enumerate(texts)]
        asked = zip(QUESTIONS, references, strict=True)
        rows = write_rows(tmp_path / f"{name}.jsonl", [{"question": q, "answer": answer} for q, answer in asked])
        prefill_thought = prefill != ""
        configs.append(inputs.config(tmp_path / name, data=str(rows), sampling=GREEDY, prefill_thought=prefill_thought))
        expected.append((completions, texts, references))

    assert run_ranks(_evaluate_all, 1, configs) == [[0, 0]]

    for config, (completions, texts, references) in zip(configs, expected, strict=True):
        rows = _verdicts(config)
        assert list(rows[0]) == COLUMNS
        assert [row["id"] for row in rows] == [f"row-{number}" for number in range(1, 8)]
        assert [row["question"] for row in rows] == list(QUESTIONS)
        assert [row["completion"] for row in rows] == texts
        assert [row["tokens"] for row in rows] == [len(ids) for ids in completions]
        assert [row["reference"] for row in rows] == references
        assert [row["answer"] for row in rows] == [text.split()[-1] for text in texts]
        assert [row["correct"] for row in rows] == [True, False, True, False, True, False, True]
        cut = [len(ids) == MAX_COMPLETION_TOKENS and ids[-1] != 394 for ids in completions]
        assert [row["finish_reason"] for row in rows] == ["length" if each else "stop" for each in cut]
        assert len(set(cut)) == 2, "the tiny model should end some turns and not others"
        results = _results(config)
        assert results["avg@1"] == {"mean": pytest.approx(4 / 7), "standard_error": pytest.approx((2 / 49) ** 0.5)}
        assert results["answers_by_reason"] == {"correct": 4, "wrong": 3}
        assert results["truncated_share"] == pytest.approx(sum(cut) / 7)
        assert results["mean_completion_tokens"] == pytest.approx(sum(map(len, completions)) / 7)
    assert [row["completion"] for row in _verdicts(configs[0])] != [row["completion"] for row in _verdicts(configs[1])]


def test_sampled_answers_follow_from_the_seed_in_every_layout(
    inputs: EvaluationInputs, dense: Dense, tmp_path: Path
) -> None:
    layouts = {"dp2": {}, "tp2": {"tp": 2, "sp": True}, "pp2": {"pp": 2}}
    cases = {
        name: inputs.config(tmp_path / name, world_size=2, model=inputs.in_layout(**layout))
        for name, layout in layouts.items()
    }
    cases["other parts"] = inputs.config(
        tmp_path / "parts", world_size=2, questions_per_part=5, sampling={"max_batch_size": 64}
    )
    cases["other seed"] = inputs.config(tmp_path / "seed", world_size=2, seed=1)

    assert run_ranks(_evaluate_all, 2, list(cases.values())) == [[0] * len(cases)] * 2

    rows = _verdicts(cases["dp2"])
    seeds = [completion_seed(0, 0, question, k) for question in range(1, 8) for k in range(2)]
    assert [row["seed"] for row in rows] == seeds
    expected = [
        dense.complete(question, prefill="<|begin_of_thought|>\n\n", seed=seeds[2 * i + k])
        for i, question in enumerate(QUESTIONS)
        for k in range(2)
    ]
    assert [row["completion"] for row in rows] == [dense.text(ids) for ids in expected]
    written = [row["completion"] for row in rows if len(row["completion"]) > 1]  # some turns end at once
    assert len(set(written)) == len(written) > len(rows) / 2
    for name in ("tp2", "pp2", "other parts"):
        assert _verdicts(cases[name]) == rows, name
    assert [row["completion"] for row in _verdicts(cases["other seed"])] != [row["completion"] for row in rows]


def test_rows_that_cannot_be_asked_or_judged_are_listed_and_the_others_keep_their_seeds(
    inputs: EvaluationInputs, tmp_path: Path
) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"id": "good", "question": "What is 1/2 + 1/4?", "answer": "\\frac{3}{4}"},
            {"id": "vague", "question": "What is it?", "answer": "it depends"},
            {"id": "long", "question": "the answer is seven " * 40, "answer": "7"},
            {"id": "turn", "question": "What <|im_end|> is it?", "answer": "7"},
            b"not json",
            {"id": "last", "question": "What is 3 + 4?", "answer": 7},
        ],
    )
    config = inputs.config(tmp_path, data=str(rows), kind="math", world_size=2)
    assert run_ranks(_evaluate_all, 2, [config]) == [[0], [0]]

    rejected = [json.loads(line) for line in (config.output_dir / "rejected.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in rejected] == [
        (2, "unreadable_answer"),
        (3, "too_long"),
        (4, "unusable_prompt"),
        (5, "not_json"),
    ]
    assert "'it depends'" in rejected[0]["detail"]
    assert "more than prompts.max_prompt_tokens = 120" in rejected[1]["detail"]
    assert _results(config)["rows_rejected"] == dict.fromkeys(sorted(row["reason"] for row in rejected), 1)
    verdicts = _verdicts(config)
    assert [(row["id"], row["reference"]) for row in verdicts] == [("good", "\\frac{3}{4}")] * 2 + [("last", "7")] * 2
    assert [row["seed"] for row in verdicts] == [completion_seed(0, 0, row, k) for row in (1, 6) for k in range(2)]
    assert not any(row["correct"] for row in verdicts)


def test_a_generated_countdown_set_is_asked_and_judged(inputs: EvaluationInputs, tmp_path: Path) -> None:
    sizes = {"num_numbers": 3, "largest_number": 9, "smallest_target": 5, "largest_target": 50, "use_all": False}
    config = inputs.config(
        tmp_path,
        data="countdown:3:7",
        kind=None,
        countdown=sizes,
        question_template="Solve. {question}",
        prompts={"student_system": "", "max_prompt_tokens": 200},
    )
    assert run_ranks(_evaluate_all, 1, [config]) == [[0]]
    drawn = draw_countdown(7, 3, **sizes)
    rows = _verdicts(config)
    assert [row["id"] for row in rows] == [f"countdown-7-{number}" for number in (1, 1, 2, 2, 3, 3)]
    assert [row["question"] for row in rows[::2]] == [f"Solve. {problem.question}" for problem in drawn]
    assert [row["reference"] for row in rows[::2]] == [problem.solution for problem in drawn]
    assert {row["reason"] for row in rows} <= {"not an expression", "other numbers", "wrong value", "no answer"}
    assert _results(config)["kind"] == "countdown"
