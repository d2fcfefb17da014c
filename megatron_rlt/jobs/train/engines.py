"""Puts together what an RL step needs: both models in their layouts, engines, formats and the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.sections import GrpoConfig, ModelConfig, RewardConfig
from megatron_rlt.jobs.reward.score_pairs import build_layouts, divergence_engine, logprob_engine
from megatron_rlt.jobs.reward.student_panel import FurtherStudent, StudentPanel
from megatron_rlt.jobs.rl.engines import build_policy, sampling_engine
from megatron_rlt.jobs.rl.mismatch import MismatchWatch
from megatron_rlt.jobs.run.load_models import load_frozen_model, load_model, load_reference, take_holdings
from megatron_rlt.metrics.memory import Holdings
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.policy.policy import Policy
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rewards.rlt import penalty_table
from megatron_rlt.rollout.requests import SamplingEngine
from megatron_rlt.scoring.divergence import DivergenceEngine
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import FormatFlag, OnProgress


@dataclass(frozen=True)
class RlRooms:
    """Everything that `rl.step` calls."""

    seed: int
    grpo: GrpoConfig
    reward: RewardConfig
    penalties: dict[FormatFlag, float]
    pairs: PairBuilder
    max_completion_tokens: int
    rollout: SamplingEngine
    policy: Policy
    old_policy: LogprobEngine  # the policy's weights before the update
    mismatch: MismatchWatch
    student: LogprobEngine
    divergence: DivergenceEngine | None  # only for the exact KL
    panel: StudentPanel  # the students beside the first
    reference: LogprobEngine | None  # only with beta > 0
    reference_model: LanguageModel | None

    def take_holdings(self) -> Holdings:
        """Bytes of all models, the optimizer and the caches on this rank, at most since the last call."""
        students = (self.student.model, *(one.engine.model for one in self.panel.further.values()))
        references = () if self.reference_model is None else (self.reference_model,)
        return take_holdings(self.policy, (*students, *references), self.rollout)


def build_rooms(
    config: TrainConfig, pairs: PairBuilder, further_pairs: Mapping[str, PairBuilder], on_progress: OnProgress
) -> RlRooms:
    """Load every model and bind the engines to them. Collective; raises ValueError for folders that do not fit.

    Args:
        pairs: formats of teacher and student.
        further_pairs: formats of teacher and each further student, by name.
    """
    teacher_layout, student_layout = build_layouts(config.teacher.layout, config.student.layout)
    ask = partial(logprob_engine, temperature=config.temperature, scoring=config.scoring, on_progress=on_progress)
    model = load_model(config.teacher, teacher_layout)
    student = ask(load_frozen_model(config.student, student_layout), student_layout)
    reference_model = load_reference(config.teacher, config.grpo, teacher_layout)
    old_policy = ask(model, teacher_layout)
    further = {
        name: _further_student(config, model, further_pairs[name], old_policy, on_progress)
        for name, model in config.students.extra.items()
    }
    return RlRooms(
        seed=config.seed,
        grpo=config.grpo,
        reward=config.reward,
        penalties=penalty_table(config.reward.penalties),
        pairs=pairs,
        max_completion_tokens=config.rollout.max_completion_tokens,
        rollout=sampling_engine(
            config,
            config.teacher,
            model,
            teacher_layout,
            temperature=config.temperature,
            num_token_ids=min(
                _num_token_ids(model, reads, engine)
                for reads, engine in ((pairs, student), *((one.pairs, one.engine) for one in further.values()))
            ),
            stop=pairs.teacher.stop_condition(stop_at_end_tag=config.rollout.stop_at_end_tag),
            on_progress=on_progress,
        ),
        policy=build_policy(config, model, teacher_layout, temperature=config.temperature, on_progress=on_progress),
        old_policy=old_policy,
        mismatch=MismatchWatch.of_run(config.mismatch, config.output_dir, pairs.teacher.tokenizer.decode),
        student=student,
        divergence=divergence_engine(old_policy, student, estimator=config.reward.kl_estimator, scoring=config.scoring),
        panel=StudentPanel(further, config.students, config.reward, penalty_table(config.reward.penalties)),
        reference=None if reference_model is None else ask(reference_model, teacher_layout),
        reference_model=reference_model,
    )


def _further_student(
    config: TrainConfig, model: ModelConfig, pairs: PairBuilder, old_policy: LogprobEngine, on_progress: OnProgress
) -> FurtherStudent:
    layout = build_layout(model.layout)
    engine = logprob_engine(
        load_frozen_model(model, layout),
        layout,
        temperature=config.temperature,
        scoring=config.scoring,
        on_progress=on_progress,
    )
    divergence = divergence_engine(old_policy, engine, estimator=config.reward.kl_estimator, scoring=config.scoring)
    return FurtherStudent(engine, pairs, divergence)


def _num_token_ids(teacher: LanguageModel, pairs: PairBuilder, student: LogprobEngine) -> int:
    """Ids the teacher may sample. Of one tokenizer, models are padded to different sizes: a student cannot score ids it
    lacks. One with another tokenizer reads text, which only ids of the teacher's tokenizer have."""
    others = student.model.unpadded_vocab_size if pairs.one_tokenizer else pairs.teacher.tokenizer.num_ids
    return min(teacher.unpadded_vocab_size, others)
