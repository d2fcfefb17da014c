"""TRL's side of `tools.bench.against_trl`: GRPOTrainer with the reference's reward. Runs in the bench's environment.

Phases: `rollout` and `reward` are TRL's own methods; `reference` is what else happens before its loss; `update` is the
rest of the step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tools.bench.reference_reward import ReferenceReward, RewardSettings
from tools.bench.turns import StepClock, Task, report, turns

_LOADING = {"dtype": torch.float32, "attn_implementation": "sdpa"}


class TimedTrainer(GRPOTrainer):  # type: ignore[misc]  # trl is not installed where types are checked
    """GRPOTrainer with a clock around its stages; nothing it does is changed."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        self.seconds: dict[str, float] = {}
        self.lengths: list[int] = []
        self.mean_reward = float("nan")

    def _generate_and_score_completions(self, inputs: object) -> object:
        with self._clock("experience"):
            return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts: object) -> tuple[Any, ...]:
        with self._clock("rollout"):
            generated: tuple[Any, ...] = super()._generate(prompts)
        self.lengths = [len(ids) for ids in generated[1]]
        return generated

    def _calculate_rewards(self, *arguments: object) -> torch.Tensor:
        with self._clock("reward"):
            rewards: torch.Tensor = super()._calculate_rewards(*arguments)
        self.mean_reward = float(rewards.mean())
        return rewards

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


class Turns(TrainerCallback):  # type: ignore[misc]
    """Waits before every step, reports after it."""

    def __init__(self, completion_tokens: int) -> None:
        self.trainer: TimedTrainer | None = None
        self._turns = turns()
        self._completion_tokens = completion_tokens
        self._clock = StepClock()

    def on_step_begin(self, *_: object, **__: object) -> None:
        next(self._turns)
        self._clock = StepClock()

    def on_step_end(self, *_: object, **__: object) -> None:
        times, trainer = self._clock.read(), self.trainer
        assert trainer is not None
        assert set(trainer.lengths) == {self._completion_tokens}, f"completions of {set(trainer.lengths)} tokens"
        taken = trainer.seconds
        phases = {
            "rollout": taken["rollout"],
            "reward": taken["reward"],
            "reference": taken["experience"] - taken["rollout"] - taken["reward"],
            "update": times["seconds"] - taken["experience"],
        }
        report({**times, "phases": phases, "mean_reward": trainer.mean_reward})


def main() -> None:
    task = Task.load(Path(sys.argv[1]))
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    rows = [{"prompt": texts["teacher_prompt"], **texts} for texts in task.texts]
    found = tokenizer([row["prompt"] for row in rows])["input_ids"]
    assert found == task.prompt_ids, "TRL's prompts have other tokens"
    policy, student = (AutoModelForCausalLM.from_pretrained(task.model, **_LOADING) for _ in range(2))
    callback = Turns(task.settings["rollout"]["max_completion_tokens"])
    trainer = TimedTrainer(
        model=policy,
        reward_funcs=ReferenceReward(tokenizer, policy, student.eval(), _reward_settings(task)).rewards,
        args=_arguments(task),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.train()


def _reward_settings(task: Task) -> RewardSettings:
    reward = task.settings["reward"]
    return RewardSettings(
        temperature=task.settings["temperature"],
        alpha=reward["alpha"],
        lambda_kl=reward["lambda_kl"],
        missing_end_tag=reward["penalties"]["missing_end_tag"],
    )


def _arguments(task: Task) -> GRPOConfig:
    """The paper's algorithm in TRL's words, in fp32 on the CPU, nothing recomputed, logged or saved."""
    grpo, num_tokens = task.settings["grpo"], task.settings["rollout"]["max_completion_tokens"]
    num_completions = grpo["questions_per_step"] * grpo["group_size"]
    return GRPOConfig(
        output_dir=task.settings["output_dir"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=task.num_steps,
        learning_rate=task.settings["optimizer"]["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        per_device_train_batch_size=grpo["micro_batch_size"],
        gradient_accumulation_steps=num_completions // grpo["micro_batch_size"],
        num_generations=grpo["group_size"],
        max_completion_length=num_tokens,
        generation_kwargs={"min_new_tokens": num_tokens},
        temperature=task.settings["temperature"],
        beta=0.0 if grpo["reference"] is None else grpo["reference"]["beta"],
        loss_type="grpo",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


if __name__ == "__main__":
    main()
