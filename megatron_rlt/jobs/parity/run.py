"""`megatron-rlt parity`: do all programs that a `train` puts together give the same tokens the same log-probs?

The same token ids go through transformers (dense, fp32), Megatron in the job's layouts, and the job's sampling engine.
The models are put together as `train` does it: what is compared is what would run.
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

from megatron_rlt.config.architecture import Architecture, position_limit
from megatron_rlt.config.commands.parity import ParityConfig
from megatron_rlt.jobs.parity.gaps import Contest, PairGap, Side, pair_gaps, print_gaps
from megatron_rlt.jobs.reward.score_pairs import build_pairs, logprob_engine
from megatron_rlt.jobs.rl.grpo import Draw, sample_groups
from megatron_rlt.jobs.run.problems import first_problems
from megatron_rlt.jobs.train.engines import RlRooms, build_rooms
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.models.dense import dense_logprobs
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rollout.vllm.synced_engines import ColocatedVllm, ServedVllm
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Completion, OnProgress, Problem, Prompt, ScoringPair, SpannedSequence, StoppedError

PARITY_FILE = "parity.json"


@dataclass(frozen=True, eq=False)
class Written:
    """A row's prompt, and the completion that was sampled for it; None: its reasoning trace is taken."""

    prompt: Prompt
    completion: Completion | None

    def pair(self, pairs: PairBuilder) -> ScoringPair:
        """As the teacher and a student read it."""
        if self.completion is not None:
            return pairs.pair(self.prompt, self.completion)
        trace = self.prompt.problem.reasoning_trace
        assert trace is not None, "rows without a trace were refused"
        return pairs.pair_from_text(self.prompt.problem, trace)


def run_parity(config: ParityConfig, heartbeat: Heartbeat) -> int:
    """Compare and print the table. Collective; returns the exit status.

    Raises:
        ValueError: models, tokenizers or data do not go together; before any weight is loaded.
        StoppedError: a pair of programs differs by more than `parity.max_gap`, or gives no number.
    """
    heartbeat.beat("validate")
    make_pairs = partial(build_pairs, config.teacher.model, prompts=config.prompts, reward=config.reward)
    pairs = make_pairs(config.student.model)
    further = {name: make_pairs(model.model) for name, model in config.students.extra.items()}
    problems = first_problems(config.data.path, config.parity.num_rows, work_dir=config.output_dir / "data")
    check_rows(config, {"student": pairs} | further, problems)

    def on_progress(detail: str) -> None:
        heartbeat.beat(heartbeat.phase, detail)

    heartbeat.beat("load")
    without_reference = config.model_copy(update={"grpo": config.grpo.model_copy(update={"beta": 0.0})})
    rooms = build_rooms(without_reference, pairs, further, on_progress)
    gaps = [gap for contest in contests(config, rooms, problems, heartbeat, on_progress) for gap in pair_gaps(contest)]
    if dist.get_rank() == 0:
        _write(config.output_dir / PARITY_FILE, gaps)
        print_gaps(gaps, max_gap=config.parity.max_gap, console=Console())
    dist.barrier()  # the table is out before any rank ends
    if not all(gap.maximum <= config.parity.max_gap for gap in gaps):
        raise StoppedError(_complaint(gaps, config.parity.max_gap))
    return 0


def check_rows(config: ParityConfig, formats: dict[str, PairBuilder], problems: Sequence[Problem]) -> None:
    """Raise ValueError naming the first row that cannot be used."""
    limits = {name: position_limit(Architecture.from_folder(model.model)) for name, model in config.models.items()}
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


def contests(
    config: ParityConfig, rooms: RlRooms, problems: Sequence[Problem], heartbeat: Heartbeat, on_progress: OnProgress
) -> list[Contest]:
    """Ask every program about every model's tokens. Collective.

    vLLM is asked in two ways: as it samples, and for the log-probs of what it sampled as of a prompt.
    """
    heartbeat.beat("rollout")
    written = _write_completions(config, rooms, problems)
    ids = tuple(problem.problem_id for problem in problems)
    ask = partial(_ask, config, heartbeat=heartbeat, on_progress=on_progress)
    teacher = tuple(one.pair(rooms.pairs).teacher for one in written)
    sides = ask("teacher", rooms.old_policy, teacher)
    sampled = tuple(one.completion.rollout_logprobs for one in written if one.completion is not None)
    if sampled:
        sides = (*sides, Side(f"{config.rollout.engine} sampling", sampled))
    decode = rooms.pairs.teacher.tokenizer.decode
    found = [Contest("teacher", ids, teacher, decode, sides)]
    if sampled and isinstance(rooms.rollout, ColocatedVllm | ServedVllm):
        heartbeat.beat("teacher (vllm prompt)")
        prompted = _ask_for_prompts(config, rooms, rooms.rollout, teacher, on_progress)
        found.append(Contest("teacher, temperature 1", ids, teacher, decode, prompted))
    students = {"student": (rooms.pairs, rooms.student)}
    students |= {f"students.extra.{name}": (one.pairs, one.engine) for name, one in rooms.panel.further.items()}
    for name, (pairs, engine) in students.items():
        sequences = tuple(one.pair(pairs).student for one in written)
        found.append(Contest(name, ids, sequences, pairs.student.tokenizer.decode, ask(name, engine, sequences)))
    return found


def _write_completions(config: ParityConfig, rooms: RlRooms, problems: Sequence[Problem]) -> list[Written]:
    prompts = [rooms.pairs.teacher.prompt(problem) for problem in problems]
    if config.parity.completions == "given":
        return [Written(prompt, None) for prompt in prompts]
    draw = Draw(config.seed, 0, first_question=0)
    groups = sample_groups(rooms.rollout, prompts, draw, group_size=1, policy_version=0)
    return [Written(group.prompt, group.completions[0]) for group in groups]


def _ask(
    config: ParityConfig,
    name: str,
    engine: LogprobEngine,
    sequences: tuple[SpannedSequence, ...],
    *,
    heartbeat: Heartbeat,
    on_progress: OnProgress,
) -> tuple[Side, ...]:
    """Megatron in the job's layout on all ranks, transformers on the first."""
    heartbeat.beat(f"{name} (megatron)")
    megatron = engine.logprobs(sequences).values
    heartbeat.beat(f"{name} (transformers)")
    dense: tuple[Tensor, ...] | None = None
    if dist.get_rank() == 0:
        folder = config.models[name].model
        dense = dense_logprobs(folder, sequences, temperature=config.temperature, on_progress=on_progress)
    dense = broadcast_record(dense, source_rank=0, group=world())
    assert dense is not None, "the first rank has asked"
    return Side("transformers", dense), Side("megatron", megatron)


def _ask_for_prompts(
    config: ParityConfig,
    rooms: RlRooms,
    engine: ColocatedVllm | ServedVllm,
    sequences: tuple[SpannedSequence, ...],
    on_progress: OnProgress,
) -> tuple[Side, ...]:
    """vLLM's log-probs of given tokens, at temperature 1 whatever it samples at, and Megatron's beside them."""
    model, layout = rooms.policy.model, rooms.policy.layout
    megatron = logprob_engine(model, layout, temperature=1.0, scoring=config.scoring, on_progress=on_progress)
    prompted = tuple(
        engine.prompt_logprobs(sequence.token_ids)[sequence.target_positions - 1] for sequence in sequences
    )
    return Side("megatron", megatron.logprobs(sequences).values), Side("vllm prompt", prompted)


def _complaint(gaps: Sequence[PairGap], max_gap: float) -> str:
    above = [gap for gap in gaps if not gap.maximum <= max_gap]
    pairs = "; ".join(f"{gap.model}: {gap.sides[0]} and {gap.sides[1]} by {gap.maximum:.3g}" for gap in above)
    return f"log-probs of the same tokens differ by more than parity.max_gap={max_gap:g}: {pairs}"


def _write(file: Path, gaps: Sequence[PairGap]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps([asdict(gap) for gap in gaps], indent=2), encoding="utf-8")
    temporary.replace(file)
