"""`megatron-rlt collect`: a teacher's explanations of a data set, scored by a student if there is one, and selected.

First all explanations are sampled, then all are scored, each part by part; then training rows are selected. What is
there already is used again: other selections and other controls sample nothing anew.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.folders.description import tokenizer_in
from megatron_rlt.data.shards import read_manifest
from megatron_rlt.jobs.collect.engines import CollectModels
from megatron_rlt.jobs.collect.identity import Origin, find_origin, samples_identity, scores_identity
from megatron_rlt.jobs.collect.report import print_explanations, write_selection
from megatron_rlt.jobs.collect.rows import read_questions, validate_questions
from megatron_rlt.jobs.collect.sampling import SamplingContext, sample_part, sampled_explanation, sampling_metrics
from megatron_rlt.jobs.collect.scoring import RATE, Explanation, score_all
from megatron_rlt.jobs.run.frame import log_to_stdout
from megatron_rlt.jobs.run.part_loop import PartRun
from megatron_rlt.jobs.run.problems import open_shards
from megatron_rlt.jobs.run.signals import EndRequest
from megatron_rlt.jobs.run.validate_rows import RowReport
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.prompts.pairs import PairBuilder, pair_builder
from megatron_rlt.rewards.control import other_questions
from megatron_rlt.rewards.terms import LABELS
from megatron_rlt.store.explanation_row import StoredExplanation
from megatron_rlt.store.explanations import explanation_store, read_explanations
from megatron_rlt.store.parts import PartStore
from megatron_rlt.store.run_folder import check_command, write_run_folder
from megatron_rlt.types import ENDED_EARLY

_COMMAND = "collect"
_SHOWN_SAMPLING = ("well_formed_share", "completion_tokens", RATE)

SAMPLES, PARTS, EXPLANATIONS, REJECTED = "samples", "parts", "explanations.parquet", "rejected.jsonl"
"""Folders and files in the run folder, and in the folder of a scoring."""

logger = logging.getLogger(__name__)


def run_collect(config: CollectConfig, heartbeat: Heartbeat) -> int:
    """Collect, or continue after the last complete part, and select. Collective; returns the exit status.

    Raises ValueError before any weight is loaded if models, data and run folder do not fit, or no row is usable.
    """
    end = EndRequest(config.output_dir)
    check_command(config.output_dir, _COMMAND)
    log_to_stdout()
    heartbeat.beat("validate")
    origin = find_origin(config, heartbeat.on_progress)
    student = config.teacher if config.student is None else config.student
    pairs = pair_builder(tokenizer_in(config.teacher.model), tokenizer_in(student.model), config.prompts)
    shards = open_shards(config.data, config.output_dir / "data")
    samples, scores = open_stores(config, origin, read_manifest(shards).content_hash)
    samples.is_finished()  # refuses rows of another run
    is_finished = scores.is_finished()
    dist.barrier()  # every rank has looked before one writes
    is_writer = dist.get_rank() == 0
    if is_writer:
        write_run_folder(config.output_dir, _COMMAND, config, world_size=dist.get_world_size())
    run, report = PartRun(config.metrics, heartbeat=heartbeat, end=end), None
    if not is_finished:
        report = validate_questions(shards, config.share, pairs, heartbeat.on_progress)
        if not _Collection(config, samples, scores, origin, pairs, shards, report, run).complete(heartbeat):
            return ENDED_EARLY
    if is_writer:
        heartbeat.beat("select")
        scores.remove()  # also what a start that was killed at its end has left
        folder = scoring_folder(config)
        explanations = folder / EXPLANATIONS
        if is_finished:
            logger.info("%s holds these explanations already: only selecting", explanations)
        selection = write_selection(explanations, folder / f"sft_{config.selection.name}.jsonl", config.selection)
        files = {"Explanations": explanations, "Training rows": selection.file}
        print_explanations("Collection", explanations, report, selection, run.totals, files)
    return 0


def scoring_folder(config: CollectConfig) -> Path:
    """Where one scoring's results lie: several can share what was sampled."""
    if config.student is None:
        return config.output_dir / "unscored"
    return config.output_dir / ("scored" if config.control == "none" else f"control_{config.control}")


def open_stores(config: CollectConfig, origin: Origin, content_hash: str) -> tuple[PartStore, PartStore]:
    """The stores of the samples and of this scoring; changes nothing. All ranks look, one writes."""
    folder, build = scoring_folder(config), partial(explanation_store, terms=tuple(LABELS), key="output_dir")
    samples = samples_identity(config, origin, content_hash)
    scores = scores_identity(config, origin, content_hash)
    reward = None if config.student is None else config.reward
    return (
        build(config.output_dir / SAMPLES, samples, reward=None, output=None),
        build(folder / PARTS, scores, reward=reward, output=folder / EXPLANATIONS),
    )


@dataclass(frozen=True)
class _Collection:
    """One start on a collection that is not complete."""

    config: CollectConfig
    samples: PartStore
    scores: PartStore
    origin: Origin
    pairs: PairBuilder
    shards: Path
    report: RowReport
    run: PartRun

    def complete(self, heartbeat: Heartbeat) -> bool:
        """Sample and score what is left; False if the run was asked to end before. Collective."""
        config, num_usable = self.config, self.report.num_usable
        others = self._other_questions() if config.control == "other_question" else None
        num_sampled, num_scored = self.run.begin(
            (self.samples, self.scores),
            self.report,
            config.output_dir / REJECTED,
            asked=f"{config.data}: {num_usable} questions, {config.num_explanations} explanations each",
        )
        heartbeat.beat("load")
        models = CollectModels(config, self.pairs, heartbeat.on_progress)
        num_parts = math.ceil(num_usable / config.questions_per_part)
        if num_sampled < num_parts and not self._sample(models.sampling(config), num_sampled, num_parts):
            return False
        return score_all(
            models.scoring,
            lambda number, timer: self._sampled(number, others, timer),
            self.scores,
            self.run,
            title=f"{_COMMAND}: {'write' if config.student is None else 'score'}",
            folder=scoring_folder(config),
            num_done=num_scored,
            num_parts=num_parts,
        )

    def _sample(self, context: SamplingContext, num_done: int, num_parts: int) -> bool:
        size, is_writer = self.config.questions_per_part, dist.get_rank() == 0
        questions = islice(self.report.usable(read_questions(self.shards, self.config.share)), num_done * size, None)

        def take_part(number: int, timer: PhaseTimer) -> dict[str, float]:
            started = time.monotonic()
            rows = sample_part(context, list(islice(questions, size)), timer)
            with timer.phase("write"):
                if is_writer:
                    self.samples.write(number, [row.cells() for row in rows])
            return sampling_metrics(rows) | {RATE: len(rows) / (time.monotonic() - started)}

        return self.run.run(
            take_part,
            title=f"{_COMMAND}: sample",
            folder=self.samples.folder,
            num_done=num_done,
            num_parts=num_parts,
            shown=_SHOWN_SAMPLING,
        )

    def _sampled(self, number: int, others: Sequence[int] | None, timer: PhaseTimer) -> list[Explanation]:
        """The explanations of a sampled part, with what a control puts in their place. Collective."""
        with timer.phase("read"):
            box: tuple[list[StoredExplanation], list[Tensor | None]] = ([], [])
            if dist.get_rank() == 0:
                rows = self._read(number)
                box = rows, self._other_ids(others, number) if others is not None else [None] * len(rows)
            rows, other_ids = broadcast_record(box, source_rank=0, group=world())
        with timer.phase("pairs"):
            origin = asdict(self.origin)
            return [
                sampled_explanation(self.pairs, replace(row, **origin), ids)
                for row, ids in zip(rows, other_ids, strict=True)
            ]

    def _read(self, number: int) -> list[StoredExplanation]:
        return list(read_explanations(self.samples.part(number), with_tokens=True))

    def _other_questions(self) -> list[int]:
        """By the number of a usable question: whose explanation is scored in its explanation's place."""
        questions = [
            question.problem.question for question in self.report.usable(read_questions(self.shards, self.config.share))
        ]
        return other_questions(questions, seed=self.config.seed)

    def _other_ids(self, others: Sequence[int], number: int) -> list[Tensor | None]:
        """The explanations of other questions that belong to those of a part."""
        size, count = self.config.questions_per_part, self.config.num_explanations
        places = [divmod(other, size) for other in others[number * size : (number + 1) * size]]
        ids = {part: [row.explanation_ids for row in self._read(part)] for part in sorted({part for part, _ in places})}
        return [ids[part][place * count + member] for part, place in places for member in range(count)]
