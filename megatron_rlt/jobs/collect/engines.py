"""Puts teacher and student on the ranks when `collect` or `score` needs them: the teacher to sample, both to score."""

from __future__ import annotations

from megatron_rlt.checkpoint.weights import load_trained_weights
from megatron_rlt.config.architecture import position_limit
from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.config.folders.description import architecture_in
from megatron_rlt.config.models import ModelConfig
from megatron_rlt.jobs.collect.sampling import SamplingContext
from megatron_rlt.jobs.collect.scoring import ScoringContext
from megatron_rlt.jobs.reward.scorer import build_scorer
from megatron_rlt.jobs.rl.engines import sampling_engine
from megatron_rlt.jobs.run.load_models import load_frozen_model
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import OnProgress


class CollectModels:
    """Both models of one start; each is loaded once, when it is first needed."""

    def __init__(self, config: CollectConfig | ScoreConfig, pairs: PairBuilder, on_progress: OnProgress) -> None:
        """Make the process groups; loads nothing yet. Collective."""
        self._config, self._pairs, self._on_progress = config, pairs, on_progress
        student = config.teacher if config.student is None else config.student
        self._teacher_layout = build_layout(config.teacher.layout)
        shared = student.layout == config.teacher.layout
        self._student_layout = self._teacher_layout if shared else build_layout(student.layout)
        self._teacher_model: LanguageModel | None = None

    def sampling(self, config: CollectConfig) -> SamplingContext:
        """What sampling needs. Collective; raises ValueError for a folder or checkpoint that does not fit."""
        teacher = self._pairs.teacher
        engine = sampling_engine(
            config,
            config.teacher,
            self._teacher(),
            num_token_ids=teacher.tokenizer.num_ids,
            stop=teacher.stop_condition(stop_at_end_tag=config.rollout.stop_at_end_tag),
            on_progress=self._on_progress,
        )
        return SamplingContext(config.seed, config.num_explanations, self._pairs, engine)

    def scoring(self) -> ScoringContext:
        """What scoring needs; without a student no model at all. Collective, as `sampling`."""
        config = self._config
        teacher = student = None
        if config.student is not None:
            teacher = self._ask(self._teacher())
            student = build_scorer(
                teacher,
                self._ask(load_frozen_model(config.student, self._student_layout)),
                self._pairs,
                reward=config.reward,
                scoring=config.scoring,
                with_baseline=isinstance(config, ScoreConfig) and config.baseline,
            )
        return ScoringContext(
            pairs=self._pairs,
            control=config.control,
            teacher=teacher,
            student=student,
            max_teacher_tokens=longest(config.teacher),
            max_student_tokens=longest(config.student or config.teacher),
        )

    def _teacher(self) -> LanguageModel:
        config = self._config
        if self._teacher_model is None:
            self._teacher_model = load_frozen_model(config.teacher, self._teacher_layout)
            if isinstance(config, CollectConfig) and config.teacher_checkpoint is not None:
                with self._teacher_model.onloaded(changes=True):
                    load_trained_weights(self._teacher_model, config.teacher_checkpoint)
        return self._teacher_model

    def _ask(self, model: LanguageModel) -> LogprobEngine:
        temperature, scoring = self._config.temperature, self._config.scoring
        return LogprobEngine(model, temperature=temperature, scoring=scoring, on_progress=self._on_progress)


def longest(model: ModelConfig) -> int:
    """Tokens in the longest sequence that a model reads."""
    return position_limit(architecture_in(model.model))
