"""`megatron-rlt sft`: supervised fine-tuning on the target spans of rows with a reasoning trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from megatron_rlt.config.commands.sft import EvaluationLossConfig, SftConfig
from megatron_rlt.config.folders.description import tokenizer_in
from megatron_rlt.jobs.run.load_models import load_model, memory_usage
from megatron_rlt.jobs.run.problems import open_problems, read_problems
from megatron_rlt.jobs.run.training_loop import TrainingRun
from megatron_rlt.jobs.run.training_state import TrainingState
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.policy.policy import Policy
from megatron_rlt.prompts.kept_sequences import KeptSequences
from megatron_rlt.prompts.pairs import student_format, teacher_format
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Problem, SpannedSequence

_TEMPERATURE = 1.0  # the loss is the plain cross-entropy
_MOST_KEPT_TOKENS = 4_000_000  # about 50 MB per rank, text included
_SHOWN = ("loss", "evaluation_loss", "lr")


def run_sft(config: SftConfig, heartbeat: Heartbeat) -> int:
    """Train a model, or resume from its run folder. Collective; returns the exit status.

    Raises ValueError, before loading weights, if model, tokenizer, data or run folder do not fit together.
    """
    run = TrainingRun(config, "sft", heartbeat, trained="model")
    with run.timer.phase("setup"):
        sequence_of = _sequence_maker(config)
        held_out: tuple[SpannedSequence, ...] = ()
        if config.evaluation is not None:
            work_dir = config.output_dir / "evaluation_data"
            held_out = read_problems(config.evaluation.data, work_dir=work_dir, use=sequence_of)
        stream = open_problems(config.data, seed=config.seed, work_dir=config.output_dir / "data", check=sequence_of)
        num_steps = config.num_updates(num_rows=stream.num_rows)
        policy = Policy(
            load_model(config.model, build_layout(config.model.layout)),
            optimizer=config.optimizer,
            blocks=config.scoring,
            temperature=_TEMPERATURE,
            max_tokens_per_pack=config.max_tokens_per_pack,
            micro_batch_size=config.micro_batch_size,
            num_updates=num_steps,
            on_progress=run.on_progress,
        )
        engine = LogprobEngine(
            policy.model, temperature=_TEMPERATURE, scoring=config.scoring, on_progress=run.on_progress
        )

    run.watch_memory(lambda: memory_usage(policy, (), None))

    def take_step(number: int) -> dict[str, float]:
        with run.timer.phase("data"):
            sequences = [sequence_of(problem) for problem in stream.next_batch(config.global_batch_size)]
        with run.timer.phase("update") as phase:
            phase.count(sum(len(sequence) for sequence in sequences), policy.model_flops(sequences))
            metrics = sft_update(policy, sequences)
        if _is_due(config.evaluation, number + 1, num_steps):
            with run.timer.phase("evaluation") as phase:
                phase.count(sum(len(sequence) for sequence in held_out), engine.model_flops(held_out))
                metrics["evaluation_loss"] = mean_cross_entropy(engine, held_out)
        return metrics

    return run.train(TrainingState(policy, None, stream), take_step, num_steps=num_steps, shown=_SHOWN)


def sft_update(policy: Policy, sequences: list[SpannedSequence]) -> dict[str, float]:
    """One update on the mean cross-entropy over the target tokens of all sequences. Collective; returns metrics."""
    num_targets = sum(sequence.num_targets for sequence in sequences)

    def loss(_: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, tuple[float, float]]:
        share = -logprobs.sum() / num_targets
        return share, (float(share.detach()), float(entropy.sum()) / num_targets)

    update = policy.update(sequences, loss)
    return {
        "loss": sum(record[0] for record in update.records),
        "entropy": sum(record[1] for record in update.records),
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "skipped_updates": float(update.skipped),
        "target_tokens": float(num_targets),
    }


def mean_cross_entropy(engine: LogprobEngine, sequences: Sequence[SpannedSequence]) -> float:
    """Mean cross-entropy over the target tokens of all sequences, with the current weights. Collective."""
    logprobs = engine.logprobs(sequences).values
    return -sum(float(values.double().sum()) for values in logprobs) / sum(len(values) for values in logprobs)


def _sequence_maker(config: SftConfig) -> Callable[[Problem], SpannedSequence]:
    """Cached encoder of rows in the configured role's format; it raises ValueError for an unusable row."""
    make_sequence: Callable[[Problem], SpannedSequence]
    if config.role == "teacher":
        make_sequence = teacher_format(tokenizer_in(config.model.model), config.prompts).sft_sequence
    else:
        student = student_format(tokenizer_in(config.model.model), config.prompts)
        make_sequence = partial(student.sft_sequence, whole_turn=config.loss_on == "assistant_turn")

    def sequence_of(problem: Problem) -> SpannedSequence:
        sequence = make_sequence(problem)
        if len(sequence) > config.max_tokens:
            raise ValueError(
                f"problem {problem.problem_id}: its sequence has {len(sequence)} tokens, more than max_tokens = "
                f"{config.max_tokens}; drop the row or raise the limit"
            )
        return sequence

    return KeptSequences(sequence_of, max_tokens=_MOST_KEPT_TOKENS)


def _is_due(evaluation: EvaluationLossConfig | None, step: int, num_steps: int) -> bool:
    """Whether the weights after a step, counted from 1, are evaluated."""
    return evaluation is not None and (step % evaluation.interval_steps == 0 or step == num_steps)
