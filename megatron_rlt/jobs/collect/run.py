"""`megatron-rlt collect`: a teacher's explanations of a data set, scored by a student if there is one, and selected.

First all explanations are sampled, then all are scored, each part by part; then training rows are selected. What is
there already is used again: other selections and other placebos sample nothing anew.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.data.shards import read_manifest
from megatron_rlt.jobs.collect.engines import CollectModels
from megatron_rlt.jobs.collect.identity import find_origin, samples_identity, scores_identity
from megatron_rlt.jobs.collect.report import print_collection, write_selection
from megatron_rlt.jobs.collect.rows import open_shards, survey_questions, usable_questions
from megatron_rlt.jobs.collect.sampling import SamplingRooms, sample_part, sampling_metrics
from megatron_rlt.jobs.collect.scoring import ScoringRooms, score_part, scoring_metrics
from megatron_rlt.jobs.reward.score_pairs import build_pairs, shown_parts
from megatron_rlt.jobs.run.part_loop import PartRun
from megatron_rlt.jobs.run.signals import EndRequest
from megatron_rlt.jobs.run.validate_rows import Survey, write_rejected
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rewards.placebo import other_questions
from megatron_rlt.store.collected import ExplanationStore, Origin, SampledExplanation, SampleStore
from megatron_rlt.store.parts import holds_rows_of
from megatron_rlt.store.run_folder import check_command, write_run_folder
from megatron_rlt.types import ENDED_EARLY

_COMMAND = "collect"


_RATE = "explanations_per_second"


_SHOWN_SAMPLING = ("well_formed_share", "completion_tokens", _RATE)


SAMPLES, PARTS, EXPLANATIONS, REJECTED = "samples", "parts", "explanations.parquet", "rejected.jsonl"
"""Folders and files in the run folder, and in the folder of a scoring."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stores:
    """Where a collection lies. All ranks look, one writes."""

    samples: SampleStore
    scores: ExplanationStore
    folder: Path  # of this scoring

    @property
    def explanations(self) -> Path:
        return self.folder / EXPLANATIONS


def run_collect(config: CollectConfig, heartbeat: Heartbeat) -> int:
    """Collect, or continue after the last complete part, and select. Collective; returns the exit status.

    Raises:
        ValueError: models, tokenizers, data or run folder do not go together, or no row is usable; before any weight
            is loaded.
    """
    end = EndRequest()
    check_command(config.output_dir, _COMMAND)
    is_writer = dist.get_rank() == 0
    if is_writer:
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
        logging.getLogger("megatron_rlt").setLevel(logging.INFO)
    heartbeat.beat("validate")
    origin = find_origin(config, lambda name: heartbeat.beat("validate", name))
    student = config.teacher if config.student is None else config.student
    pairs = build_pairs(config.teacher.model, student.model, config.prompts, config.reward)
    shards = open_shards(config.data, config.output_dir / "data")
    stores, is_finished = open_stores(config, origin, read_manifest(shards).content_hash)
    dist.barrier()  # every rank has looked before one writes
    if is_writer:
        write_run_folder(config.output_dir, _COMMAND, config, world_size=dist.get_world_size())
    collection = _Collection(config, stores, heartbeat, end)
    if not is_finished and not collection.complete(pairs, shards):
        return ENDED_EARLY
    if is_writer:
        heartbeat.beat("select")
        stores.scores.remove()  # also what a start that was killed at its end has left
        if is_finished:
            logger.info("%s holds these explanations already: only selecting", stores.explanations)
        report = write_selection(
            stores.explanations, stores.folder / f"sft_{config.selection.name}.jsonl", config.selection
        )
        print_collection(stores.explanations, report, collection.num_rejected, collection.totals, Console())
    return 0


def scoring_folder(config: CollectConfig) -> Path:
    """Where one scoring's results lie: several can share what was sampled."""
    if config.student is None:
        return config.output_dir / "unscored"
    return config.output_dir / ("scored" if config.placebo == "none" else f"placebo_{config.placebo}")


def open_stores(config: CollectConfig, origin: Origin, content_hash: str) -> tuple[Stores, bool]:
    """The stores, and whether the explanations are there already. Reads only.

    Raises:
        ValueError: what is there was made by a run with other settings, models or data.
    """
    folder = scoring_folder(config)
    samples = SampleStore(config.output_dir / SAMPLES, samples_identity(config, origin, content_hash))
    identity = scores_identity(config, origin, content_hash)
    stores = Stores(samples, ExplanationStore(folder / PARTS, identity, origin), folder)
    stores.samples.check()
    stores.scores.check()
    return stores, holds_rows_of(stores.explanations, identity)


class _Collection:
    """One start on a collection that is not complete."""

    def __init__(self, config: CollectConfig, stores: Stores, heartbeat: Heartbeat, end: EndRequest) -> None:
        self._config, self._stores, self._heartbeat, self._end = config, stores, heartbeat, end
        self._is_writer = dist.get_rank() == 0
        self.totals: Counter[str] = Counter()  # seconds and tokens of this start by phase
        self.num_rejected: int | None = None

    def complete(self, pairs: PairBuilder, shards: Path) -> bool:
        """Sample and score what is left; False if the run was asked to end before. Collective."""
        survey = survey_questions(shards, pairs, lambda row: self._heartbeat.beat("validate", f"row {row}"))
        self.num_rejected = len(survey.rejected)
        others = self._other_questions(shards, survey) if self._config.placebo == "other_question" else None
        counts = self._begin(survey) if self._is_writer else (0, 0)
        num_sampled, num_scored = broadcast_record(counts, source_rank=0, group=world())
        self._heartbeat.beat("load")
        models = CollectModels(self._config, pairs, lambda detail: self._heartbeat.beat(self._heartbeat.phase, detail))
        num_parts = math.ceil(survey.num_usable / self._config.questions_per_part)
        if num_sampled < num_parts and not self._sample(models.sampling(), shards, survey, num_sampled, num_parts):
            return False
        if num_scored < num_parts and not self._score(models.scoring(), others, num_scored, num_parts):
            return False
        if self._is_writer:
            self._heartbeat.beat("write")
            self._stores.scores.join(self._stores.explanations, num_parts)
        return True

    def _begin(self, survey: Survey) -> tuple[int, int]:
        """The writing rank's beginnings. Returns how many parts are sampled, and how many are scored."""
        config = self._config
        rejected = config.output_dir / REJECTED
        write_rejected(rejected, survey)
        logger.info(
            "%s: %d questions, %d explanations each; %s",
            config.data, survey.num_usable, config.num_explanations, survey.describe_rejected(rejected),
        )  # fmt: skip
        counts = self._stores.samples.begin(), self._stores.scores.begin()
        if any(counts):
            logger.info(
                "done already: %d parts sampled, %d scored, of %d questions", *counts, config.questions_per_part
            )
        return counts

    def _sample(self, rooms: SamplingRooms, shards: Path, survey: Survey, num_done: int, num_parts: int) -> bool:
        size = self._config.questions_per_part
        questions = islice(usable_questions(shards, survey), num_done * size, None)

        def take_part(number: int, timer: PhaseTimer) -> dict[str, float]:
            started = time.monotonic()
            samples = sample_part(rooms, list(islice(questions, size)), timer)
            with timer.phase("write"):
                if self._is_writer:
                    self._stores.samples.write_samples(number, samples)
            return sampling_metrics(samples) | {_RATE: len(samples) / (time.monotonic() - started)}

        run = self._part_run("sample", self._stores.samples.folder)
        is_done = run.run(take_part, num_done=num_done, num_parts=num_parts, shown=_SHOWN_SAMPLING)
        self.totals.update(run.totals)
        return is_done

    def _score(self, rooms: ScoringRooms, others: list[int] | None, num_done: int, num_parts: int) -> bool:
        def take_part(number: int, timer: PhaseTimer) -> dict[str, float]:
            started = time.monotonic()
            with timer.phase("read"):
                box = (self._read(number), self._read_others(others, number)) if self._is_writer else ([], None)
                samples, their_others = broadcast_record(box, source_rank=0, group=world())
            scores = score_part(rooms, samples, their_others, timer)
            with timer.phase("write"):
                if self._is_writer:
                    self._stores.scores.write_scores(number, self._stores.samples, scores)
            return scoring_metrics(scores) | {_RATE: len(scores) / (time.monotonic() - started)}

        what, shown = ("write", (_RATE,)) if rooms.scorer is None else ("score", (*shown_parts(rooms.pairs), _RATE))
        run = self._part_run(what, self._stores.folder)
        is_done = run.run(take_part, num_done=num_done, num_parts=num_parts, shown=shown)
        self.totals.update(run.totals)
        return is_done

    def _part_run(self, what: str, folder: Path) -> PartRun:
        """Sampling and scoring have a folder of metrics each."""
        title = f"{_COMMAND}: {what}"
        return PartRun(title, folder, self._config.metrics, heartbeat=self._heartbeat, end=self._end)

    def _other_questions(self, shards: Path, survey: Survey) -> list[int]:
        """By the number of a usable question: whose explanation is scored in its explanation's place."""
        questions = [question.problem.question for question in usable_questions(shards, survey)]
        return other_questions(questions, seed=self._config.seed)

    def _read(self, number: int) -> list[SampledExplanation]:
        return self._stores.samples.read_samples(number, temperature=self._config.temperature)

    def _read_others(self, others: Sequence[int] | None, number: int) -> list[SampledExplanation] | None:
        """The explanations of other questions that belong to those of a part."""
        if others is None:
            return None
        size, count = self._config.questions_per_part, self._config.num_explanations
        places = [divmod(other, size) for other in others[number * size : (number + 1) * size]]
        parts = {part: self._read(part) for part in sorted({part for part, _ in places})}
        return [parts[part][place * count + member] for part, place in places for member in range(count)]
