"""Puts the models of `collect` on the ranks when their turn comes: the teacher to sample, both to score."""

from __future__ import annotations

from megatron_rlt.checkpoint.weights import load_trained_weights
from megatron_rlt.config.architecture import Architecture, position_limit
from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.sections import ModelConfig
from megatron_rlt.jobs.collect.sampling import SamplingRooms
from megatron_rlt.jobs.collect.scoring import ScoringRooms
from megatron_rlt.jobs.reward.score_pairs import Scorer, build_layouts, divergence_engine, logprob_engine
from megatron_rlt.jobs.rl.engines import sampling_engine
from megatron_rlt.jobs.run.load_models import load_frozen_model
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rewards.rlt import penalty_table
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import OnProgress


class CollectModels:
    """Both models of one start; each is loaded once, when it is first needed."""

    def __init__(self, config: CollectConfig, pairs: PairBuilder, on_progress: OnProgress) -> None:
        """Make the process groups; loads nothing yet. Collective.

        Raises:
            ValueError: a model has no row for an id of its tokenizer.
        """
        self._config, self._pairs, self._on_progress = config, pairs, on_progress
        for name, model in config.models.items():
            vocab_size = Architecture.from_folder(model.model).vocab_size
            tokenizer = pairs.teacher.tokenizer if name == "teacher" else pairs.student.tokenizer
            if vocab_size < tokenizer.num_ids:
                raise ValueError(
                    f"{name}.model: has a vocabulary of {vocab_size} and cannot read the tokenizer's"
                    f" {tokenizer.num_ids} ids; take the model and the tokenizer that belong together"
                )
        student = config.teacher if config.student is None else config.student
        self._teacher_layout, self._student_layout = build_layouts(config.teacher.layout, student.layout)
        self._teacher_model: LanguageModel | None = None

    def sampling(self) -> SamplingRooms:
        """What sampling needs. Collective; raises ValueError for a folder or checkpoint that does not fit."""
        config = self._config
        engine = sampling_engine(
            config,
            config.teacher,
            self._teacher(),
            self._teacher_layout,
            num_token_ids=self._pairs.teacher.tokenizer.num_ids,
            temperature=config.temperature,
            stop=self._pairs.teacher.stop_condition(stop_at_end_tag=config.rollout.stop_at_end_tag),
            on_progress=self._on_progress,
        )
        return SamplingRooms(config.seed, config.num_explanations, self._pairs, engine)

    def scoring(self) -> ScoringRooms:
        """What scoring needs; without a student no model at all. Collective, as `sampling`."""
        student = self._config.student
        return ScoringRooms(
            pairs=self._pairs,
            placebo=self._config.placebo,
            scorer=None if student is None else self._scorer(student),
            max_teacher_tokens=_longest(self._config.teacher),
            max_student_tokens=_longest(self._config.teacher if student is None else student),
        )

    def _scorer(self, student_config: ModelConfig) -> Scorer:
        config = self._config
        teacher = self._ask(self._teacher(), is_teacher=True)
        student = self._ask(load_frozen_model(student_config, self._student_layout), is_teacher=False)
        return Scorer(
            teacher=teacher,
            student=student,
            student_format=self._pairs.student,
            divergence=divergence_engine(
                teacher, student, estimator=config.reward.kl_estimator, scoring=config.scoring
            ),
            reward=config.reward,
            penalties=penalty_table(config.reward.penalties),
        )

    def _teacher(self) -> LanguageModel:
        if self._teacher_model is None:
            self._teacher_model = load_frozen_model(self._config.teacher, self._teacher_layout)
            if self._config.teacher_checkpoint is not None:
                with self._teacher_model.on_device(changes=True):
                    load_trained_weights(self._teacher_model, self._config.teacher_checkpoint, self._teacher_layout)
        return self._teacher_model

    def _ask(self, model: LanguageModel, *, is_teacher: bool) -> LogprobEngine:
        return logprob_engine(
            model,
            self._teacher_layout if is_teacher else self._student_layout,
            temperature=self._config.temperature,
            scoring=self._config.scoring,
            on_progress=self._on_progress,
        )


def _longest(model: ModelConfig) -> int:
    return position_limit(Architecture.from_folder(model.model))
