"""What a collection is made of: the origin that its rows carry, and what must be equal for two runs to share rows.

Rows that a teacher sampled can serve several scorings; how explanations are selected is part of neither identity.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_rlt.checkpoint.weights import trained_weights_fingerprint
from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.jobs.run.fingerprints import model_fingerprint
from megatron_rlt.store.collected import Origin
from megatron_rlt.store.run_folder import lasting_values

# Keys, or sections, that decide what is sampled. Batch sizes and layouts change no more than the last bits.
_OF_SAMPLES = (
    "seed",
    "num_explanations",
    "questions_per_part",
    "temperature",
    "teacher.dtype",
    "prompts.tags",
    "prompts.custom_tags",
    "prompts.teacher_system",
    "prompts.max_prompt_tokens",
    "rollout.engine",
    "rollout.max_completion_tokens",
    "rollout.stop_at_end_tag",
    "rollout.top_p",
)


_OF_SCORES = ("student.dtype", "prompts.student_system", "reward", "placebo")


_DIGITS = 16  # of a hash that a person may have to read: 64 bits


def find_origin(config: CollectConfig, on_file: Callable[[str], None]) -> Origin:
    """Read both models' files. Collective on the whole job; raises ValueError for a checkpoint without manifest.

    Args:
        on_file: called with the name of a file before it is read.
    """
    teacher, student, checkpoint = config.teacher.model, config.student, config.teacher_checkpoint
    fingerprint = model_fingerprint(teacher, on_file)
    if checkpoint is not None:
        fingerprint += f"+{trained_weights_fingerprint(checkpoint)}"
    return Origin(
        teacher=str(checkpoint or teacher),
        teacher_fingerprint=fingerprint,
        student=None if student is None else str(student.model),
        student_fingerprint=None if student is None else model_fingerprint(student.model, on_file),
        placebo=config.placebo,
        temperature=config.temperature,
        top_p=config.rollout.top_p,
        max_completion_tokens=config.rollout.max_completion_tokens,
        run_seed=config.seed,
    )


def samples_identity(config: CollectConfig, origin: Origin, content_hash: str) -> dict[str, object]:
    """What decides what is sampled, by the names a refusal uses; `content_hash` is that of the rows."""
    return _chosen(config, _OF_SAMPLES) | {
        "content of data": content_hash[:_DIGITS],
        "content of teacher": origin.teacher_fingerprint,
    }


def scores_identity(config: CollectConfig, origin: Origin, content_hash: str) -> dict[str, object]:
    """What decides what is sampled, and how it is scored."""
    sampled = samples_identity(config, origin, content_hash)
    return sampled | _chosen(config, _OF_SCORES) | {"content of student": origin.student_fingerprint}


def _chosen(config: CollectConfig, wanted: tuple[str, ...]) -> dict[str, object]:
    values = lasting_values(config.model_dump(mode="json"))
    return {
        key: value for key, value in values.items() if any(key == name or key.startswith(f"{name}.") for name in wanted)
    }
