"""`megatron-rlt score`: the RLT reward of explanations that already exist: `collect` without sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.config.folders.description import tokenizer_in
from megatron_rlt.data.traces import read_traces
from megatron_rlt.jobs.collect.engines import CollectModels, longest
from megatron_rlt.jobs.collect.identity import find_origin, score_identity
from megatron_rlt.jobs.collect.report import print_explanations
from megatron_rlt.jobs.collect.scoring import Explanation, score_all
from megatron_rlt.jobs.run.frame import log_to_stdout
from megatron_rlt.jobs.run.part_loop import PartRun
from megatron_rlt.jobs.run.signals import EndRequest
from megatron_rlt.jobs.run.validate_rows import validate_rows
from megatron_rlt.jobs.score.rows import TraceReader, check_lengths, other_explanations
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.prompts.pairs import pair_builder
from megatron_rlt.rewards.terms import LABELS
from megatron_rlt.store.explanations import explanation_store
from megatron_rlt.store.parts import PartStore
from megatron_rlt.store.run_folder import check_run_folder, write_run_folder
from megatron_rlt.types import ENDED_EARLY

_COMMAND = "score"


def run_score(config: ScoreConfig, heartbeat: Heartbeat) -> int:
    """Score all rows, or continue after the last complete part. Collective; returns the exit status.

    Raises ValueError before any weight is loaded if models, files and run folder do not fit, or no row is usable.
    """
    end, is_writer = EndRequest(config.output_dir), dist.get_rank() == 0
    check_run_folder(config.output_dir, _COMMAND, config)
    log_to_stdout()
    heartbeat.beat("validate")
    origin = find_origin(config, heartbeat.on_progress)
    store = open_store(config, score_identity(config, origin))
    is_finished = store.is_finished()
    dist.barrier()  # every rank has looked before one writes
    if is_finished:
        if is_writer:
            store.remove()
            print(f"Nothing to do: {config.output} holds these scores already")
        return 0
    pairs = pair_builder(tokenizer_in(config.teacher.model), tokenizer_in(config.student.model), config.prompts)
    others = other_explanations(config.input, seed=config.seed) if config.control == "other_question" else {}
    reader = TraceReader(pairs, config.control, config.temperature, config.seed, origin, others)
    report = validate_rows(
        str(config.input),
        read_traces(config.input),
        check_lengths(reader, teacher=longest(config.teacher), student=longest(config.student)),
        heartbeat.on_progress,
    )
    if is_writer:
        write_run_folder(config.output_dir, _COMMAND, config, world_size=dist.get_world_size())
    run, rejected = PartRun(config.metrics, heartbeat=heartbeat, end=end), rejected_file(config.output)
    (num_done,) = run.begin((store,), report, rejected, asked=f"{config.input}: {report.num_usable} rows to score")
    heartbeat.beat("load")
    traces = islice(reader.numbered(report.usable(read_traces(config.input))), num_done * config.rows_per_part, None)

    def read_part(_number: int, timer: PhaseTimer) -> list[Explanation]:
        with timer.phase("prompts"):
            return [reader.explanation(*numbered) for numbered in islice(traces, config.rows_per_part)]

    if not score_all(
        CollectModels(config, pairs, heartbeat.on_progress).scoring,
        read_part,
        store,
        run,
        title=_COMMAND,
        folder=config.output_dir,
        num_done=num_done,
        num_parts=math.ceil(report.num_usable / config.rows_per_part),
    ):
        return ENDED_EARLY
    if is_writer:
        heartbeat.beat("write")
        store.remove()
        files = {"Scores": config.output} | ({"Rejected rows": rejected} if report.rejected else {})
        print_explanations("Scores", config.output, report, None, run.totals, files)
    return 0


def open_store(config: ScoreConfig, identity: Mapping[str, object]) -> PartStore:
    """The store of the scores, whose parts lie beside the output until all are there; changes nothing."""
    return explanation_store(
        config.output.with_name(f"{config.output.name}.parts"),
        identity,
        terms=tuple(LABELS),
        reward=config.reward,
        output=config.output,
        key="output",
    )


def rejected_file(output: Path) -> Path:
    """Where the rejected rows are listed."""
    return output.with_name(f"{output.name}.rejected.jsonl")
