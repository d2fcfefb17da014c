"""`megatron-rlt score`: the RLT reward of explanations that already exist, part by part, without training."""

from __future__ import annotations

import hashlib
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from megatron_rlt.config.architecture import Architecture, position_limit
from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.data.rows import source_digest
from megatron_rlt.data.traces import Trace, read_traces
from megatron_rlt.jobs.reward.baselines import solution_baselines, unexplained
from megatron_rlt.jobs.reward.score_pairs import (
    Scorer,
    build_layouts,
    build_pairs,
    divergence_engine,
    logprob_engine,
    shown_parts,
)
from megatron_rlt.jobs.run.load_models import load_frozen_model
from megatron_rlt.jobs.run.part_loop import PartRun
from megatron_rlt.jobs.run.signals import EndRequest
from megatron_rlt.jobs.run.validate_rows import Survey, survey_rows, write_rejected
from megatron_rlt.jobs.score.report import print_scores
from megatron_rlt.jobs.score.rows import LengthCheck, TracePairs, trace_pairs, usable_traces
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.rewards.ranking import ranks_within
from megatron_rlt.rewards.rlt import penalty_table, solution_score, why_invalid
from megatron_rlt.store.run_folder import check_run_folder, lasting_values, write_run_folder
from megatron_rlt.store.scores import GAINS, PARTS, ScoredRow, ScoreStore
from megatron_rlt.types import ENDED_EARLY, OnProgress, RewardParts, ScoringPair

_COMMAND = "score"


_DIGITS = 16  # of a hash that a person may have to read: 64 bits


_NOT_IDENTITY = ("input", "output")  # a file may move: the input counts by its content, and the output is the place


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreRooms:
    """Everything that scoring a part calls."""

    pairs: TracePairs
    scorer: Scorer
    with_baseline: bool


def run_score(config: ScoreConfig, heartbeat: Heartbeat) -> int:
    """Score all rows, or continue after the last complete part. Collective; returns the exit status.

    Raises:
        ValueError: tokenizers, input, output or run folder do not go together, or no row is usable; before any
            weight is loaded.
    """
    end = EndRequest()
    check_run_folder(config.output_dir, _COMMAND, config)
    heartbeat.beat("validate")
    store = ScoreStore(config.output, score_identity(config)) if dist.get_rank() == 0 else None
    if broadcast_record(store is not None and store.is_finished(), source_rank=0, group=world()):
        if store is not None:
            store.clean_up()
            print(f"Nothing to do: {config.output} holds these scores already")
        return 0
    pairs = trace_pairs(
        config.input,
        build_pairs(config.teacher.model, config.student.model, config.prompts, config.reward),
        placebo=config.placebo,
        seed=config.seed,
    )
    survey = survey_rows(
        str(config.input),
        read_traces(config.input),
        _length_check(config, pairs),
        lambda row: heartbeat.beat("validate", f"row {row}"),
    )
    num_done = _begin(config, store, survey) if store is not None else 0
    num_done = broadcast_record(num_done, source_rank=0, group=world())
    heartbeat.beat("load")
    rooms = build_score_rooms(config, pairs, lambda detail: heartbeat.beat(heartbeat.phase, detail))
    traces = islice(usable_traces(config.input, survey), num_done * config.rows_per_part, None)
    num_parts = math.ceil(survey.num_usable / config.rows_per_part)

    def take_part(number: int, timer: PhaseTimer) -> dict[str, float]:
        rows = score_part(rooms, list(islice(traces, config.rows_per_part)), timer)
        with timer.phase("write"):
            if store is not None:
                store.write_part(number, rows)
        return _means(rows, (*PARTS, *GAINS) if config.baseline else PARTS)

    run = PartRun(_COMMAND, config.output_dir, config.metrics, heartbeat=heartbeat, end=end)
    if not run.run(take_part, num_done=num_done, num_parts=num_parts, shown=shown_parts(pairs.pairs)):
        return ENDED_EARLY
    if store is not None:
        heartbeat.beat("write")
        store.finish(num_parts, ranks_within(*store.rewards(num_parts)))
        print_scores(store.output, rejected_file(config.output), survey, run.totals, Console())
    return 0


def score_identity(config: ScoreConfig) -> dict[str, object]:
    """What must be equal for two runs to give the same scores, by the names a refusal uses."""
    values = lasting_values(config.model_dump(mode="json"))
    return {key: value for key, value in values.items() if key not in _NOT_IDENTITY} | {
        "content of input (SHA-256)": source_digest(str(config.input))[:_DIGITS],
        "files of teacher.model": _state_of_files(config.teacher.model),
        "files of student.model": _state_of_files(config.student.model),
    }


def rejected_file(output: Path) -> Path:
    """Where the rejected rows are listed."""
    return output.with_name(f"{output.name}.rejected.jsonl")


def build_score_rooms(config: ScoreConfig, pairs: TracePairs, on_progress: OnProgress) -> ScoreRooms:
    """Load both models, each in its layout. Collective; raises ValueError for folders that do not fit."""
    teacher_layout, student_layout = build_layouts(config.teacher.layout, config.student.layout)
    teacher, student = (
        logprob_engine(
            load_frozen_model(model, layout),
            layout,
            temperature=config.temperature,
            scoring=config.scoring,
            on_progress=on_progress,
        )
        for model, layout in ((config.teacher, teacher_layout), (config.student, student_layout))
    )
    scorer = Scorer(
        teacher=teacher,
        student=student,
        student_format=pairs.pairs.student,
        divergence=divergence_engine(teacher, student, estimator=config.reward.kl_estimator, scoring=config.scoring),
        reward=config.reward,
        penalties=penalty_table(config.reward.penalties),
    )
    return ScoreRooms(pairs, scorer, config.baseline)


def score_part(rooms: ScoreRooms, traces: Sequence[Trace], timer: PhaseTimer) -> list[ScoredRow]:
    """Ask teacher and student, reward. Collective: every rank passes the same rows and gets all of them back."""
    with timer.phase("prompts"):
        pairs = [rooms.pairs(trace) for trace in traces]
    rewards = rooms.scorer.rewards(pairs, timer)
    if not rooms.with_baseline:
        return [_scored_row(pair, parts, None) for pair, parts in zip(pairs, rewards, strict=True)]
    with timer.phase("baseline") as phase:
        student_format = rooms.scorer.student_format
        baselines = solution_baselines(rooms.scorer.student, student_format, pairs, "gain")
        asked = list(unexplained(student_format, pairs).values())
        phase.count(sum(len(sequence) for sequence in asked), rooms.scorer.student.model_flops(asked))
    return [_scored_row(*row) for row in zip(pairs, rewards, baselines, strict=True)]


def _scored_row(pair: ScoringPair, parts: RewardParts, baseline: Tensor | None) -> ScoredRow:
    if baseline is None:
        return ScoredRow(pair, parts, why_invalid(parts), math.nan, math.nan)
    alone = solution_score(baseline, baseline_logprobs=None, unit="logprob", alpha=0.0)
    gain = solution_score(parts.student_solution_logprobs, baseline_logprobs=baseline, unit="gain", alpha=0.0)
    return ScoredRow(pair, parts, why_invalid(parts), alone.mean, gain.mean)


def _begin(config: ScoreConfig, store: ScoreStore, survey: Survey) -> int:
    """The writing rank's beginnings: run folder, log, rejected rows, parts. Returns the number of parts done."""
    write_run_folder(config.output_dir, _COMMAND, config, world_size=dist.get_world_size())
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("megatron_rlt").setLevel(logging.INFO)
    num_done = store.begin()
    rejected = rejected_file(config.output)
    write_rejected(rejected, survey)
    logger.info("%s: %d rows to score, %s", config.input, survey.num_usable, survey.describe_rejected(rejected))
    if num_done:
        logger.info("%d parts of %d rows are done already", num_done, config.rows_per_part)
    return num_done


def _length_check(config: ScoreConfig, pairs: TracePairs) -> LengthCheck:
    return LengthCheck(
        pairs,
        max_teacher_tokens=position_limit(Architecture.from_folder(config.teacher.model)),
        max_student_tokens=position_limit(Architecture.from_folder(config.student.model)),
    )


def _means(rows: Sequence[ScoredRow], names: Sequence[str]) -> dict[str, float]:
    """Means over the rows that have a reward, and how many have none."""
    kept = [vars(row.parts) | vars(row) for row in rows if row.dropped is None]
    means = {name: Tally.of(values[name] for values in kept).mean for name in names}
    return means | {"dropped_rows": float(len(rows) - len(kept))}


def _state_of_files(folder: Path) -> str:
    """Names, sizes and times of a model's files: an export that replaced another one is another model."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    states = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(states).encode()).hexdigest()[:_DIGITS]
