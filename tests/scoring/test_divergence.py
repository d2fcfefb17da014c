"""Exact divergence per explanation token: equal to dense softmaxes, models of different shape in different layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rlt.config.models import LayoutConfig, ScoringConfig
from megatron_rlt.parallel.layout import Layout, build_layout
from megatron_rlt.scoring.divergence import DivergenceEngine
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Problem, ScoringPair, Span, SpannedSequence
from tests.models.loading import loaded_model
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

TEMPERATURE = 0.7
TEACHER_VOCAB, STUDENT_VOCAB = 131, 140  # the student's embedding has more (unused) entries, as Qwen's sizes differ
EXPLANATION_LENGTHS = (5, 0, 1, 12, 3, 7)
LAYOUTS = {
    2: [
        (LayoutConfig(tp=2, sp=True), LayoutConfig(pp=2)),
        (LayoutConfig(), LayoutConfig(tp=2)),
        (LayoutConfig(pp=2), LayoutConfig()),
        (LayoutConfig(cp=2), LayoutConfig(tp=2)),
    ],
    4: [(LayoutConfig(tp=2, pp=2, sp=True), LayoutConfig(tp=4)), (LayoutConfig(tp=2, cp=2), LayoutConfig(pp=2, cp=2))],
}


def make_pairs() -> list[ScoringPair]:
    """Teacher: prompt, explanation, two more tokens. Student: another prompt, the same explanation, a solution."""
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> Tensor:
        return torch.randint(TEACHER_VOCAB, (count,), generator=generator)

    pairs = []
    for number, count in enumerate(EXPLANATION_LENGTHS):
        explanation = ids(count)
        teacher = torch.cat([ids(4 + number), explanation, ids(2)])
        student = torch.cat([ids(3), explanation, ids(6)])
        pairs.append(
            ScoringPair(
                problem=Problem(str(number), "", ""),
                teacher=SpannedSequence(teacher, (Span(4 + number, len(teacher)),)),
                student=SpannedSequence(student, (Span(3, 3 + count), Span(len(student) - 4, len(student)))),
                num_explanation_tokens=count,
                flags=frozenset(),
                explanation_text="",
            )
        )
    return pairs


def _divergences(teacher: Path, student: Path, layouts: list[tuple[LayoutConfig, LayoutConfig]]) -> dict[str, list]:
    found: dict[str, list[Tensor]] = {}
    for configs in layouts:
        teacher_layout, student_layout = (build_layout(config) for config in configs)
        engines = (_scorer(teacher, teacher_layout, TEMPERATURE), _scorer(student, student_layout, TEMPERATURE))
        for max_rows_per_rank in (1, 100):
            engine = DivergenceEngine(
                *engines, ScoringConfig(max_tokens_per_pack=max_rows_per_rank, row_block=2, vocab_block=32)
            )
            name = f"{teacher_layout} against {student_layout}, {max_rows_per_rank} rows a rank"
            found[name] = list(engine.per_token(make_pairs()))
        assert engine.per_token([]) == ()
        other = _scorer(student, student_layout, 1.0)
        with pytest.raises(ValueError, match=r"got 0\.7 for the teacher and 1\.0 for the student"):
            DivergenceEngine(engines[0], other, ScoringConfig(max_tokens_per_pack=1, row_block=2, vocab_block=32))
    return found


def _scorer(folder: Path, layout: Layout, temperature: float) -> LogprobEngine:
    model = loaded_model(folder, layout, torch.float32)
    return LogprobEngine(
        model, temperature=temperature, scoring=ScoringConfig(max_tokens_per_pack=30, row_block=4, vocab_block=32)
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    teacher = tiny_hf_model(root / "teacher", "qwen3", tied=False, num_layers=2, vocab_size=TEACHER_VOCAB)
    shape = {"hidden_size": 48, "ffn_size": 64, "head_dim": 12, "num_kv_heads": 4}
    student = tiny_hf_model(
        root / "student", "llama", tied=True, seed=1, num_layers=2, vocab_size=STUDENT_VOCAB, **shape
    )
    return teacher, student


@pytest.fixture(scope="module")
def dense(folders: tuple[Path, Path]) -> list[Tensor]:
    """sum_v p_v (log p_v - log q_v) in float64 from whole logits, over the ids that both models have."""
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders)
    divergences = []
    for pair in make_pairs():
        count = pair.num_explanation_tokens
        p = _log_softmax(teacher, pair.teacher.token_ids, pair.teacher.spans[0].start, count)
        q = _log_softmax(student, pair.student.token_ids, pair.explanation_span.start, count)
        divergences.append((p.exp() * (p - q)).sum(-1).float())
    return divergences


@torch.no_grad()
def _log_softmax(model: torch.nn.Module, ids: Tensor, start: int, count: int) -> Tensor:
    logits = model(ids[None]).logits[0, start - 1 : start - 1 + count, :TEACHER_VOCAB]
    return torch.log_softmax(logits.double() / TEMPERATURE, -1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_divergence_equals_dense_softmaxes_in_different_layouts(
    world_size: int, folders: tuple[Path, Path], dense: list[Tensor]
) -> None:
    ranks = run_ranks(_divergences, world_size, *folders, LAYOUTS[world_size])
    assert len(ranks[0]) == 2 * len(LAYOUTS[world_size])
    for rank in ranks:
        for name, found in rank.items():
            assert [len(part) for part in found] == list(EXPLANATION_LENGTHS), name
            for part, expected in zip(found, dense, strict=True):
                torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_dense_divergence_is_large_enough_to_tell(dense: list[Tensor]) -> None:
    assert torch.cat(dense).min() > 0.05
