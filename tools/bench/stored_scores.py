"""Stored explanations, scored again by their student in float32, bfloat16 or FP8.

What `tools.bench.fp8` and `tools.bench.fp8_layouts` share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.config.models import LayoutConfig, ModelConfig, ScoringConfig
from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.config.reward import LeakConfig, PenaltyConfig, RewardConfig
from megatron_rlt.jobs.run.load_models import load_frozen_model
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.prompts.pairs import student_format
from megatron_rlt.rewards.rlt import rlt_reward
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.store.explanation_row import StoredExplanation
from megatron_rlt.store.explanations import read_explanations, reward_settings
from megatron_rlt.types import Problem, Reward, SpannedSequence
from tools.bench.score_noise import Scores

EXACT = "float32"
WAYS: dict[str, Fp8Config | None] = {
    EXACT: None,
    "bf16": None,
    "blockwise": Fp8Config(),
    "blockwise, power of two": Fp8Config(scales="power_of_two"),
    "tensorwise": Fp8Config(recipe="tensorwise"),
    "mxfp8": Fp8Config(recipe="mxfp8"),
    "storage (W8A16)": Fp8Config(activations=False),
    "blockwise, fc2 bf16": Fp8Config(bf16_linears=("fc2",)),
    "blockwise, 2 + 2 layers bf16": Fp8Config(bf16_layers_at_ends=2),
}
_ROWS = 1024  # hidden states whose logits exist at one time


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What a student makes of all explanation and solution tokens of a study."""

    tokens: Tensor  # `[N]` log-probs
    top_ids: Tensor  # `[N]` most probable token at each of these places


@dataclass(frozen=True, eq=False)
class Study:
    """Scored explanations of whole groups, and what their student reads of each."""

    student: Path
    rows: tuple[StoredExplanation, ...]
    groups: Tensor  # `[R]` int64, the group of each row
    sequences: tuple[SpannedSequence, ...]
    reward: RewardConfig
    temperature: float

    @property
    def token_counts(self) -> Tensor:
        """`[R]` scored tokens of each row: explanation and solution."""
        return torch.tensor([sequence.num_targets for sequence in self.sequences])


def read_study(
    files: Sequence[Path], config: Path, student: Path | None, *, num_groups: int | None, without_penalties: bool
) -> Study:
    """The first groups (None: all) of scored explanations; raises SystemExit where none has a reward.

    Args:
        config: config.yaml of the run that scored them: its prompts are used.
        student: model folder; None: the one that the rows name.
        without_penalties: leave out what form and leaks add to the reward, which no scorer moves.
    """
    rows = [row for file in files for row in read_explanations(file, with_tokens=True)]
    rows = [row for row in rows if row.reward is not None and row.student_solution_logprobs is not None]
    reward = reward_settings(files[0])
    if not rows or reward is None:
        raise SystemExit(
            "no row of these files has a reward: give explanations that `collect`, `score` or `train` scored"
        )
    if without_penalties:
        nothing = PenaltyConfig(**dict.fromkeys(PenaltyConfig.model_fields, 0.0))
        reward = reward.model_copy(update={"penalties": nothing, "leaks": LeakConfig()})
    keys = list(dict.fromkeys((row.step, row.question_index) for row in rows))[:num_groups]
    numbers = {key: number for number, key in enumerate(keys)}
    rows = [row for row in rows if (row.step, row.question_index) in numbers]
    student = student or Path(rows[0].student or "")
    prompts = PromptConfig.model_validate(yaml.safe_load(config.read_text(encoding="utf-8"))["prompts"])
    formats = student_format(student, prompts)
    return Study(
        student=student,
        rows=tuple(rows),
        groups=torch.tensor([numbers[row.step, row.question_index] for row in rows]),
        sequences=tuple(
            formats.splice(Problem(row.id, row.question, row.solution), _explanation_ids(row)) for row in rows
        ),
        reward=reward,
        temperature=rows[0].temperature,
    )


def build_engine(study: Study, way: str, layout: LayoutConfig, *, pack_tokens: int) -> LogprobEngine:
    """The student as one of `WAYS`, in a layout. Collective."""
    dtype = "float32" if way == EXACT else "bfloat16"
    config = ModelConfig(model=study.student, dtype=dtype, fp8=WAYS[way], layout=layout)  # type: ignore[arg-type]
    model = load_frozen_model(config, build_layout(layout))
    return LogprobEngine(model, temperature=study.temperature, scoring=ScoringConfig(max_tokens_per_pack=pack_tokens))


@torch.no_grad()
def score(engine: LogprobEngine, study: Study) -> TokenScores:
    """Log-probs and most probable tokens under this student, from one forward pass. One rank.

    Logits are float32 products, as in training, where they are never held whole: here every token's are looked at.
    """
    model = engine.model
    weight = model.output_weight().float()[: model.unpadded_vocab_size]
    values, top_ids = [], []
    for sequence, hidden in zip(study.sequences, engine.hidden(study.sequences), strict=True):
        targets = sequence.token_ids[sequence.target_positions].to(weight.device)
        for part, wanted in zip(torch.split(hidden.to(weight.device), _ROWS), torch.split(targets, _ROWS), strict=True):
            logits = part.float() @ weight.t()
            top_ids.append(logits.argmax(-1).cpu())
            logits /= study.temperature
            own = logits.gather(1, wanted[:, None])[:, 0]
            values.append((own - logits.logsumexp(-1)).cpu())
    return TokenScores(torch.cat(values), torch.cat(top_ids))


def with_rewards(found: TokenScores, study: Study) -> Scores:
    """The rewards of the study with these log-probs of the student; everything else is as stored."""
    parts = torch.split(found.tokens, study.token_counts.tolist())
    rewards = []
    for row, sequence, values in zip(study.rows, study.sequences, parts, strict=True):
        explanation, solution = sequence.split(values)
        rewards.append(_reward(row, explanation, solution, study.reward))
    return Scores(found.tokens, found.top_ids, tuple(rewards))


def _explanation_ids(row: StoredExplanation) -> Tensor:
    assert row.explanation_ids is not None, "rows with a reward have their ids"
    return row.explanation_ids


def _reward(row: StoredExplanation, explanation: Tensor, solution: Tensor, reward: RewardConfig) -> Reward:
    """The row's reward with other log-probs of the student; all else is as stored."""
    evidence = row.evidence(exact_kl=reward.kl_estimator == "full")
    assert evidence is not None, "rows with a reward have its evidence"
    return rlt_reward(
        replace(evidence, student_explanation_logprobs=explanation, student_solution_logprobs=solution), reward
    )
