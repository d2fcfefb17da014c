"""What `train` and `rlvr` share: the sections of an RL job, their rules and plan."""

from __future__ import annotations

import math
from typing import ClassVar

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.fp8 import not_scoring_faults
from megatron_rlt.config.mismatch import MismatchConfig, mismatch_faults
from megatron_rlt.config.models import (
    PAPER_TEMPERATURE,
    ModelConfig,
    ScoringConfig,
    Shapes,
    budget_faults,
    data_parallel_size,
    nearest_divisors,
    offload_faults,
)
from megatron_rlt.config.paths import data_faults
from megatron_rlt.config.plan import Plan, Use, model_plan, most_packs, replicas
from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.config.rollout import RolloutConfig, engine_faults, rollout_faults
from megatron_rlt.config.section import (
    PositiveInt,
    Temperature,
)
from megatron_rlt.config.training import (
    CheckpointConfig,
    DataConfig,
    GrpoConfig,
    OptimizerConfig,
    export_faults,
    grpo_faults,
    num_warmup_updates,
    optimizer_faults,
)


class RlConfig(JobConfig):
    """Keys of every RL job; the subclass says which model is trained and where rewards come from."""

    policy_name: ClassVar[str]
    """Section of the model that is trained."""

    data: DataConfig
    """Questions and solutions."""
    num_steps: PositiveInt = 125
    """RL steps; each samples, scores and trains on one batch of completions."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompts, prompt length."""
    temperature: Temperature = PAPER_TEMPERATURE
    """Temperature of sampling and of every log-prob: policy, students, reference."""
    rollout: RolloutConfig = RolloutConfig()
    """How completions are sampled, and by which engine."""
    scoring: ScoringConfig = ScoringConfig()
    """Log-prob passes without gradient."""
    grpo: GrpoConfig = GrpoConfig()
    """Batch sizes, advantages, loss, reference."""
    mismatch: MismatchConfig = MismatchConfig()
    """What is done where log-probs of sampling engine and trainer differ."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and the schedule of its learning rate."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""

    @property
    def policy(self) -> ModelConfig:
        """The model that is trained."""
        return self.models[self.policy_name]

    @property
    def num_updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.num_steps * self.grpo.updates_per_batch

    def path_faults(self) -> list[str]:
        return [*data_faults("data.path", self.data.path), *engine_faults(self.rollout), *super().path_faults()]

    def faults(self, shapes: Shapes) -> list[str]:
        prompt, completion = self.prompts.max_prompt_tokens, self.rollout.max_completion_tokens
        return [
            *super().faults(shapes),
            *self._batch_faults(),
            *grpo_faults(self.grpo),
            *mismatch_faults(self.mismatch),
            *rollout_faults(self.rollout, self.policy, shapes.get(self.policy_name), self.world_size),
            *budget_faults(shapes, prompt, completion, section="rollout"),
            *optimizer_faults(self.optimizer),
            *export_faults(self.checkpoint, shapes.get(self.policy_name)),
            *offload_faults(self.policy_name, self.policy),
            *not_scoring_faults(self.policy_name, self.policy.fp8, "trained"),
        ]

    def plan(self, shapes: Shapes) -> Plan:
        grpo, policy = self.grpo, self.policy_name
        completions = grpo.questions_per_step * grpo.group_size
        per_update = completions // grpo.updates_per_batch
        dp = {name: replicas(model, self.world_size) for name, model in self.models.items()}
        tokens = self.prompts.max_prompt_tokens + self.rollout.max_completion_tokens
        numbers = (
            ("groups per step", grpo.questions_per_step),
            ("completions per step", completions),
            ("completions per optimizer step", per_update),
            *(
                (f"{name} sequences per data-parallel rank and step, at most", math.ceil(completions / size))
                for name, size in dp.items()
            ),
            (
                "micro-batches per rank and step, at most",
                grpo.updates_per_batch
                * most_packs(
                    math.ceil(per_update / dp[policy]),
                    longest=tokens,
                    max_tokens=grpo.max_tokens_per_pack,
                    max_sequences=grpo.micro_batch_size,
                ),
            ),
            ("optimizer steps", self.num_updates),
            ("warm-up steps", num_warmup_updates(self.optimizer, self.num_updates)),
            (f"{policy} tokens per step, at most", completions * tokens),
        )
        trained: Use = "trained" if grpo.reference is None else "trained with reference"
        models = tuple(
            model_plan(name, model, shapes[name], self.world_size, use=trained if name == policy else "frozen")
            for name, model in self.models.items()
        )
        return Plan(numbers, models)

    def _batch_faults(self) -> list[str]:
        grpo, faults = self.grpo, []
        if grpo.questions_per_step % grpo.updates_per_batch != 0:
            valid = nearest_divisors(grpo.updates_per_batch, grpo.questions_per_step)
            faults.append(
                f"grpo.updates_per_batch={grpo.updates_per_batch}: must divide questions_per_step"
                f" {grpo.questions_per_step}; nearest valid: {valid}"
            )
        for name, model in self.models.items():
            parts = grpo.updates_per_batch if name == self.policy_name else 1
            dp = data_parallel_size(model.layout, self.world_size)
            completions = grpo.questions_per_step * grpo.group_size // parts
            if dp is not None and completions < dp:
                questions = grpo.questions_per_step
                faults.append(
                    f"grpo.questions_per_step={questions}: x group_size {grpo.group_size} / updates {parts}"
                    f" = {completions} completions must give each of the {name}'s {dp} data-parallel ranks at least"
                    f" one; nearest valid: {math.ceil(dp * parts / grpo.group_size)}"
                )
        return faults
