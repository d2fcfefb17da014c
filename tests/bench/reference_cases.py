"""Models and texts of `reference_rewards.json`, whose rewards the public reference's own module computed.

SakanaAI/RLT at 86a3f5c, `trainers/teacher_rewards.py:TeacherKLBasedReward`, unchanged, in fp32, with
`answer_log_prob_coeff` [1, 0.01], `kl_penalty_reward_coeff` [3, 0.03], both temperatures 0.7 and a missing end tag at
-1, as in its `cfgs/run_cfg/teacher_rlt.yaml`; prompts as its `custom_data/teacher_data.py` writes them, with the system
prompts below.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.tiny_models import tiny_hf_model
from tests.tiny_tokenizers import NEWLINES_APART, WORD, tiny_tokenizer

TEACHER_SYSTEM, STUDENT_SYSTEM = "You are a teacher.", "You are a student."
TEMPERATURE = 0.7
VOCAB_SIZE = 401
WORDS = {"joined": WORD, "apart": NEWLINES_APART}  # by what the tokenizer does with newlines after a tag


@dataclass(frozen=True)
class ReferenceCase:
    """One text and what the reference's module says of it."""

    tokenizer: str  # of `WORDS`
    question: str
    solution: str  # between the newlines of its tags
    completion: str  # what the teacher wrote after its prompt, without the end of turn
    reward: float


def reference_cases() -> list[ReferenceCase]:
    """All rows of the file."""
    text = Path(__file__).with_name("reference_rewards.json").read_text(encoding="utf-8")
    return [ReferenceCase(**row) for row in json.loads(text)]


def reference_models(folder: Path, tokenizer: str) -> tuple[Path, Path]:
    """Teacher and student: random, the same every time, with one tokenizer."""
    written = tiny_tokenizer(folder / "tokenizer", "qwen", word=WORDS[tokenizer])
    common = {"tied": False, "num_layers": 2, "vocab_size": VOCAB_SIZE, "max_positions": 600}
    teacher = tiny_hf_model(folder / "teacher", "qwen2", seed=11, **common)
    student = tiny_hf_model(folder / "student", "llama", seed=12, **common)
    for model in (teacher, student):
        shutil.copytree(written, model, dirs_exist_ok=True)
    return teacher, student
