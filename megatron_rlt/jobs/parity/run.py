"""`megatron-rlt parity`: compares log-probs of the same tokens between all backends of a `train` run.

The backends are transformers (dense, fp32), Megatron in the job's layouts, and the job's sampling engine, built by the
same code as in `train`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from megatron_rlt.config.architecture import position_limit
from megatron_rlt.config.commands.parity import ParityConfig
from megatron_rlt.config.folders.description import architecture_in
from megatron_rlt.jobs.parity.gaps import Backend, Comparison, LogprobDiff, pair_gaps, print_gaps
from megatron_rlt.jobs.reward.scorer import FIRST
from megatron_rlt.jobs.rl.grpo import SeedSource, sample_groups
from megatron_rlt.jobs.run.problems import first_problems
from megatron_rlt.jobs.train.engines import TrainContext, build_context, student_pairs
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.models.dense import dense_logprobs
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rollout.vllm.colocated import ColocatedEngine
from megatron_rlt.rollout.vllm.server_engine import ServerEngine
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Completion, OnProgress, Problem, Prompt, ScoringPair, SpannedSequence, StoppedError
from megatron_rlt.whole_files import make_folder, write_text

PARITY_FILE = "parity.json"


@dataclass(frozen=True, eq=False)
class Written:
    """A row's prompt with its sampled completion; None: use the row's reasoning trace."""

    prompt: Prompt
    completion: Completion | None

    def pair(self, pairs: PairBuilder) -> ScoringPair:
        if self.completion is not None:
            return pairs.pair(self.prompt, self.completion)
        trace = self.prompt.problem.reasoning_trace
        assert trace is not None, "rows without a trace were rejected"
        return pairs.pair_from_text(self.prompt.problem, trace)


def run_parity(config: ParityConfig, heartbeat: Heartbeat) -> int:
    """Compare and print the table. Collective; returns the exit status.

    Raises:
        ValueError: models, tokenizers or data do not fit together; before any weight is loaded.
        StoppedError: a pair of backends differs by more than `parity.max_gap`, or by NaN.
    """
    heartbeat.beat("validate")
    pairs = student_pairs(config)
    problems = first_problems(config.data.path, config.parity.num_rows, work_dir=config.output_dir / "data")
    check_rows(config, pairs, problems)
    heartbeat.beat("load")
    without_reference = config.model_copy(update={"grpo": config.grpo.model_copy(update={"beta": 0.0})})
    context = build_context(without_reference, pairs, heartbeat.on_progress)
    compared = comparisons(config, context, problems, heartbeat)
    gaps = [gap for comparison in compared for gap in pair_gaps(comparison)]
    if dist.get_rank() == 0:
        _write(config.output_dir / PARITY_FILE, gaps)
        print_gaps(gaps, max_gap=config.parity.max_gap, console=Console())
    dist.barrier()  # the table is out before any rank ends
    if not all(gap.maximum <= config.parity.max_gap for gap in gaps):
        raise StoppedError(_complaint(gaps, config.parity.max_gap))
    return 0


def check_rows(config: ParityConfig, formats: dict[str, PairBuilder], problems: Sequence[Problem]) -> None:
    """Raise ValueError naming the first row that cannot be used."""
    limits = {name: position_limit(architecture_in(model.model)) for name, model in config.models.items()}
    for problem in problems:
        if config.parity.completions == "sampled":
            for pairs in formats.values():
                pairs.check_problem(problem)
            continue
        if not problem.reasoning_trace:
            raise ValueError(
                f"parity.completions=given: problem {problem.problem_id} has no reasoning_trace; add one, or set"
                " parity.completions=sampled"
            )
        for name, pairs in formats.items():
            pair = pairs.pair_from_text(problem, problem.reasoning_trace)
            student = name if name == "student" else f"students.extra.{name}"
            for section, sequence in (("teacher", pair.teacher), (student, pair.student)):
                if len(sequence) > limits[section]:
                    raise ValueError(
                        f"problem {problem.problem_id}: its sequence has {len(sequence)} tokens, {section}.model reads"
                        f" {limits[section]} at most; drop the row, or set parity.completions=sampled"
                    )


def comparisons(
    config: ParityConfig, context: TrainContext, problems: Sequence[Problem], heartbeat: Heartbeat
) -> list[Comparison]:
    """Compute the log-probs of every model's tokens by every backend. Collective.

    vLLM's log-probs are taken twice: while sampling, and for the sampled tokens as part of a prompt.
    """
    heartbeat.beat("rollout")
    written = _write_completions(config, context, problems)
    ids = tuple(problem.problem_id for problem in problems)
    ask = partial(_ask, config, heartbeat)
    teacher = tuple(one.pair(context.students[FIRST].pairs).teacher for one in written)
    sides = ask("teacher", context.learner.old_policy, teacher)
    sampled = tuple(one.completion.rollout_logprobs for one in written if one.completion is not None)
    if sampled:
        sides = (*sides, Backend(f"{config.rollout.engine} sampling", sampled))
    decode = context.teacher.tokenizer.decode
    found = [Comparison("teacher", ids, teacher, decode, sides)]
    if sampled and isinstance(context.rollout, ColocatedEngine | ServerEngine):
        heartbeat.beat("teacher (vllm prompt)")
        prompted = _ask_for_prompts(config, context, context.rollout, teacher, heartbeat.on_progress)
        found.append(Comparison("teacher, temperature 1", ids, teacher, decode, prompted))
    for name, student in context.students.items():
        section = name if name == FIRST else f"students.extra.{name}"
        sequences = tuple(one.pair(student.pairs).student for one in written)
        sides = ask(section, student.engine, sequences)
        found.append(Comparison(section, ids, sequences, student.pairs.student.tokenizer.decode, sides))
    return found


def _write_completions(config: ParityConfig, context: TrainContext, problems: Sequence[Problem]) -> list[Written]:
    prompts = [context.teacher.prompt(problem) for problem in problems]
    if config.parity.completions == "given":
        return [Written(prompt, None) for prompt in prompts]
    seeds = SeedSource(config.seed, 0, first_question=0)
    groups = sample_groups(context.rollout, prompts, seeds, group_size=1, policy_version=0)
    return [Written(group.prompt, group.completions[0]) for group in groups]


def _ask(
    config: ParityConfig,
    heartbeat: Heartbeat,
    name: str,
    engine: LogprobEngine,
    sequences: tuple[SpannedSequence, ...],
) -> tuple[Backend, ...]:
    """Log-probs by Megatron in the job's layout on all ranks, and by transformers on the first rank."""
    heartbeat.beat(f"{name} (megatron)")
    megatron = engine.logprobs(sequences).values
    heartbeat.beat(f"{name} (transformers)")
    dense: tuple[Tensor, ...] | None = None
    if dist.get_rank() == 0:
        folder = config.models[name].model
        dense = dense_logprobs(folder, sequences, temperature=config.temperature, on_progress=heartbeat.on_progress)
    dense = broadcast_record(dense, source_rank=0, group=world())
    assert dense is not None, "the first rank has asked"
    return Backend("transformers", dense), Backend("megatron", megatron)


def _ask_for_prompts(
    config: ParityConfig,
    context: TrainContext,
    engine: ColocatedEngine | ServerEngine,
    sequences: tuple[SpannedSequence, ...],
    on_progress: OnProgress,
) -> tuple[Backend, ...]:
    """vLLM's prompt log-probs, always at temperature 1, and Megatron's at the same temperature."""
    model = context.learner.policy.model
    megatron = LogprobEngine(model, temperature=1.0, scoring=config.scoring, on_progress=on_progress)
    prompted = tuple(
        engine.prompt_logprobs(sequence.token_ids)[sequence.target_positions - 1] for sequence in sequences
    )
    return Backend("megatron", megatron.logprobs(sequences).values), Backend("vllm prompt", prompted)


def _complaint(gaps: Sequence[LogprobDiff], max_gap: float) -> str:
    above = [gap for gap in gaps if not gap.maximum <= max_gap]
    pairs = "; ".join(f"{gap.model}: {gap.sides[0]} and {gap.sides[1]} by {gap.maximum:.3g}" for gap in above)
    return f"log-probs of the same tokens differ by more than parity.max_gap={max_gap:g}: {pairs}"


def _write(file: Path, gaps: Sequence[LogprobDiff]) -> None:
    make_folder(file.parent)
    write_text(file, json.dumps([asdict(gap) for gap in gaps], indent=2))
