"""Builds what an RL step needs: both models in their layouts, sampling engine, scorers and the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.folders.description import tokenizer_in
from megatron_rlt.config.reward import StudentsConfig
from megatron_rlt.jobs.reward.scorer import FIRST, Scorer, build_scorer
from megatron_rlt.jobs.rl.engines import build_learner, sampling_engine
from megatron_rlt.jobs.rl.learner import Learner
from megatron_rlt.jobs.run.load_models import load_frozen_model, load_model, memory_usage
from megatron_rlt.jobs.train.noise_floor import NoiseFloor, NoiseProbe
from megatron_rlt.metrics.memory import MemoryUsage
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.prompts.pairs import PairBuilder, pair_builder
from megatron_rlt.prompts.teacher import TeacherFormat
from megatron_rlt.rollout.requests import SamplingEngine
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import OnProgress


@dataclass(frozen=True)
class TrainContext:
    """Models, engines and settings used by one RL training step."""

    seed: int
    teacher: TeacherFormat
    rollout: SamplingEngine
    students: Mapping[str, Scorer]  # by name, the first student first
    reduction: StudentsConfig | None  # None: one student
    learner: Learner
    noise_floor: NoiseFloor

    def memory_usage(self) -> MemoryUsage:
        """Bytes of all models, the optimizer and the KV cache on this rank; peaks since the last call."""
        students = [student.engine.model for student in self.students.values()]
        return memory_usage(self.learner.policy, (*students, self.learner.reference_model), self.rollout)


def student_pairs(config: TrainConfig) -> dict[str, PairBuilder]:
    """The formats of teacher and each student by name, the first student first; raises as `pair_builder`."""
    models = config.students_by_name
    teacher = tokenizer_in(config.teacher.model)
    return {name: pair_builder(teacher, tokenizer_in(one.model), config.prompts) for name, one in models.items()}


def build_context(config: TrainConfig, pairs: Mapping[str, PairBuilder], on_progress: OnProgress) -> TrainContext:
    """Load every model and bind the engines to them. Collective; raises ValueError for folders that do not fit."""
    logprob_engine = partial(
        LogprobEngine, temperature=config.temperature, scoring=config.scoring, on_progress=on_progress
    )
    model = load_model(config.teacher, build_layout(config.teacher.layout))
    old_policy = logprob_engine(model)
    students = {}
    for name, section in config.students_by_name.items():
        layout = model.layout if section.layout == config.teacher.layout else build_layout(section.layout)
        engine = logprob_engine(load_frozen_model(section, layout))
        students[name] = build_scorer(old_policy, engine, pairs[name], reward=config.reward, scoring=config.scoring)
    teacher = pairs[FIRST].teacher
    rollout = sampling_engine(
        config,
        config.teacher,
        model,
        num_token_ids=min(_num_token_ids(model, student) for student in students.values()),
        stop=teacher.stop_condition(stop_at_end_tag=config.rollout.stop_at_end_tag),
        on_progress=on_progress,
    )
    learner = build_learner(config, config.teacher, old_policy, teacher.tokenizer.decode, on_progress)
    probe = NoiseProbe(students, config.students_by_name, config.students, old_policy, config.scoring)
    floor = NoiseFloor(config.reward, probe)
    return TrainContext(config.seed, teacher, rollout, students, config.students, learner, floor)


def _num_token_ids(teacher: LanguageModel, student: Scorer) -> int:
    """Number of ids the teacher may sample. With one tokenizer, models are padded to different sizes: a student cannot
    score ids it lacks. With two, the student reads text, which only ids of the teacher's tokenizer have."""
    pairs = student.pairs
    others = student.engine.model.unpadded_vocab_size if pairs.one_tokenizer else pairs.teacher.tokenizer.num_ids
    return min(teacher.unpadded_vocab_size, others)
