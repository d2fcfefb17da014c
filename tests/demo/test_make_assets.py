import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlt.config.prompts import PromptConfig, TagsConfig
from megatron_rlt.prompts.pairs import PairBuilder, pair_builder
from megatron_rlt.types import Completion, FinishReason, Problem
from tools.demo.make_assets import MAX_POSITIONS, DemoAssets, make_assets

TAGS = TagsConfig(
    thought_open="<exp>", solution_open="<sol>", explanation_open="<exp>", explanation_close="</exp>", separator=" "
)
PROMPTS = PromptConfig(custom_tags=TAGS, teacher_system="", student_system="", exact_text=False)
TRACE = "5 +5 = 3 *5 = 1 *6 = 6 +4 = 3 ;"  # 14 words
PROBLEM = Problem("p", "5 +5 *5 *6 +4", "3", reasoning_trace=TRACE)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> DemoAssets:
    return make_assets(tmp_path_factory.mktemp("demo"), seed=0, num_rows=200)


@pytest.fixture(scope="module")
def pairs(assets: DemoAssets) -> PairBuilder:
    return pair_builder(assets.model, assets.model, PROMPTS)


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(assets: DemoAssets, tmp_path: Path) -> None:
    again, other = (make_assets(tmp_path / str(seed), seed=seed, num_rows=200) for seed in (0, 1))
    files = [file.relative_to(assets.train.parent) for file in assets.train.parent.rglob("*") if file.is_file()]
    assert len(files) >= 6
    for file in files:
        assert (assets.train.parent / file).read_bytes() == (again.train.parent / file).read_bytes(), file
    for name in ("train", "held_out"):
        assert getattr(assets, name).read_bytes() != getattr(other, name).read_bytes()
    weights = "model.safetensors"
    assert (assets.model / weights).read_bytes() != (other.model / weights).read_bytes()


def test_held_out_questions_are_not_trained_on(assets: DemoAssets) -> None:
    train, held_out = rows_of(assets.train), rows_of(assets.held_out)
    assert (len(train), len(held_out)) == (200, 300)
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    assert len({row["id"] for row in train + held_out}) == 500
    assert all("reasoning_trace" in row for row in train)
    assert not any("reasoning_trace" in row for row in held_out)


def test_every_word_of_the_task_has_its_own_id(assets: DemoAssets, pairs: PairBuilder) -> None:
    tokenizer = pairs.teacher.tokenizer
    for row in rows_of(assets.train):
        for text in (row["question"], row["solution"], row["reasoning_trace"]):
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert len(tokenizer.encode(text)) == len(text.split())


def test_model_has_the_recipes_size(assets: DemoAssets, pairs: PairBuilder) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets.model)
    vocab_size = len(pairs.teacher.tokenizer.hf)
    # per layer: 4 * 64 * 64 attention, 3 * 64 * 160 SwiGLU, 2 norms of 64; one last norm; two vocabulary matrices
    assert sum(p.numel() for p in model.parameters()) == 2 * (16384 + 30720 + 128) + 64 + 2 * 64 * vocab_size
    assert model.dtype == torch.float32
    assert model.config.rope_parameters["rope_theta"] == 1000.0


def test_sequences_are_as_short_as_the_recipes(pairs: PairBuilder) -> None:
    decode = pairs.teacher.tokenizer.decode
    prompt = pairs.teacher.prompt(PROBLEM)
    assert decode(prompt.token_ids.tolist()) == "<q> 5 +5 *5 *6 +4 <sol> 3 <exp>"
    assert len(prompt.token_ids) == 9
    warm_up = pairs.teacher.sft_sequence(PROBLEM)
    assert decode(warm_up.token_ids.tolist()) == f"<q> 5 +5 *5 *6 +4 <sol> 3 <exp> {TRACE} </exp> <eos>"
    assert (len(warm_up), warm_up.num_targets) == (9 + 14 + 2, 14 + 2)
    student = pairs.student.sft_sequence(PROBLEM, whole_turn=False)
    assert decode(student.token_ids.tolist()) == f"<q> 5 +5 *5 *6 +4 <exp> {TRACE} <sol> 3 <eos>"
    assert (len(student), student.num_targets) == (7 + 14 + 3, 14 + 3)


def test_a_sampled_explanation_is_spliced_word_for_word(pairs: PairBuilder) -> None:
    sampled = pairs.teacher.tokenizer.encode(f"{TRACE} </exp>")
    stop = pairs.teacher.stop_condition(stop_at_end_tag=True)
    assert [stop(sampled[:n]) for n in range(len(sampled) + 1)] == [False] * 15 + [True]
    completion = Completion(torch.tensor(sampled), torch.zeros(15), 1.0, FinishReason.STOP, seed=0, policy_version=0)
    pair = pairs.pair(pairs.teacher.prompt(PROBLEM), completion)
    assert pair.well_formed
    assert pair.explanation_text == TRACE
    assert [len(span) for span in pair.student.spans] == [14, 1]
    assert pair.student.token_ids.tolist() == pairs.student.sft_sequence(PROBLEM, whole_turn=False).token_ids.tolist()


def test_special_tokens_in_the_data_are_not_the_tokens(pairs: PairBuilder) -> None:
    pair = pairs.pair_from_text(PROBLEM, "so <eos> we <sol> get 3 .")
    assert pairs.teacher.tokenizer.end_of_turn_id not in pair.explanation_ids.tolist()
    assert {flag.value for flag in pair.flags} == {"contains_tags"}


def test_all_training_sequences_fit_the_model(assets: DemoAssets, pairs: PairBuilder) -> None:
    problems = [Problem(r["id"], r["question"], r["solution"], r["reasoning_trace"]) for r in rows_of(assets.train)]
    lengths = [len(pairs.teacher.sft_sequence(p)) for p in problems]
    lengths += [len(pairs.student.sft_sequence(p, whole_turn=False)) for p in problems]
    assert max(lengths) <= 40 < MAX_POSITIONS
