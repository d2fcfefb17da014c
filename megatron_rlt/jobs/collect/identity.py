"""What explanations are made of: the origin that their rows carry, and what must be equal for two runs to share rows.

Rows that a teacher sampled can serve several scorings; how explanations are selected is part of neither identity.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlt.checkpoint.weights import trained_weights_fingerprint
from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.jobs.run.fingerprints import model_fingerprint, rows_fingerprint, short_hash
from megatron_rlt.store.run_folder import resume_fixed_values
from megatron_rlt.types import OnProgress

# Keys, or sections, that decide what is sampled. Batch sizes and layouts change no more than the last bits.
_OF_SAMPLES = (
    "seed",
    "share",
    "num_explanations",
    "questions_per_part",
    "temperature",
    "teacher.dtype",
    "prompts.tags",
    "prompts.custom_tags",
    "prompts.teacher_system",
    "prompts.date",
    "prompts.max_prompt_tokens",
    "rollout.engine",
    "rollout.max_completion_tokens",
    "rollout.stop_at_end_tag",
    "rollout.top_p",
)
_OF_SCORES = ("student.dtype", "student.fp8", "prompts.student_system", "reward", "control")

_NOT_OF_SCORE = ("input", "output")  # a file may move: the input counts by its content, and the output is the place


@dataclass(frozen=True)
class Origin:
    """Who wrote and who scored the explanations: columns that are the same in all rows of a file."""

    teacher: str  # folder
    teacher_fingerprint: str
    student: str | None  # None: not scored
    student_fingerprint: str | None
    control: str
    run_seed: int
    top_p: float | None = None  # these two: of the sampling
    max_completion_tokens: int | None = None


def find_origin(config: CollectConfig | ScoreConfig, on_file: OnProgress) -> Origin:
    """Read both models' files; `on_file` gets each name. Collective; ValueError for a checkpoint without manifest."""
    student, rollout = config.student, config.rollout if isinstance(config, CollectConfig) else None
    checkpoint = config.teacher_checkpoint if isinstance(config, CollectConfig) else None
    fingerprint = model_fingerprint(config.teacher.model, on_file)
    if checkpoint is not None:
        fingerprint += f"+{short_hash(trained_weights_fingerprint(checkpoint))}"
    return Origin(
        teacher=str(checkpoint or config.teacher.model),
        teacher_fingerprint=fingerprint,
        student=None if student is None else str(student.model),
        student_fingerprint=None if student is None else model_fingerprint(student.model, on_file),
        control=config.control,
        run_seed=config.seed,
        top_p=None if rollout is None else rollout.top_p,
        max_completion_tokens=None if rollout is None else rollout.max_completion_tokens,
    )


def samples_identity(config: CollectConfig, origin: Origin, content_hash: str) -> dict[str, object]:
    """What decides what is sampled, by the names a refusal uses; `content_hash` is that of the rows."""
    return _chosen(config, _OF_SAMPLES) | {
        "content of data": short_hash(content_hash),
        "content of teacher": origin.teacher_fingerprint,
    }


def scores_identity(config: CollectConfig, origin: Origin, content_hash: str) -> dict[str, object]:
    """What decides what is sampled, and how it is scored."""
    sampled = samples_identity(config, origin, content_hash)
    return sampled | _chosen(config, _OF_SCORES) | {"content of student": origin.student_fingerprint}


def score_identity(config: ScoreConfig, origin: Origin) -> dict[str, object]:
    """What decides the scores of a file's explanations. Collective on the whole job."""
    values = resume_fixed_values(config.model_dump(mode="json"))
    return {key: value for key, value in values.items() if key not in _NOT_OF_SCORE} | {
        "content of input (SHA-256)": rows_fingerprint(str(config.input)),
        "content of teacher": origin.teacher_fingerprint,
        "content of student": origin.student_fingerprint,
    }


def _chosen(config: CollectConfig, wanted: tuple[str, ...]) -> dict[str, object]:
    values = resume_fixed_values(config.model_dump(mode="json"))
    return {
        key: value for key, value in values.items() if any(key == name or key.startswith(f"{name}.") for name in wanted)
    }
