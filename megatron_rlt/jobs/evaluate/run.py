"""`megatron-rlt evaluate`: a model answers questions, part by part, and every answer gets a verdict."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from rich.console import Console

from megatron_rlt.config.commands.evaluate import EvaluateConfig, EvaluationSet, evaluation_set
from megatron_rlt.data.exercises import Exercise
from megatron_rlt.data.rows import source_digest
from megatron_rlt.jobs.evaluate.report import print_results, write_results
from megatron_rlt.jobs.evaluate.rows import ExerciseCheck, Prompter, survey_exercises
from megatron_rlt.jobs.reward.judging import AnswerJudge, judge_on_ranks
from megatron_rlt.jobs.run.fingerprints import model_fingerprint
from megatron_rlt.jobs.run.load_models import load_frozen_model
from megatron_rlt.jobs.run.part_loop import PartRun
from megatron_rlt.jobs.run.signals import EndRequest
from megatron_rlt.jobs.run.validate_rows import Survey, write_rejected
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.parallel.platform import world
from megatron_rlt.prompts.pairs import student_format
from megatron_rlt.rollout.megatron.engine import MegatronEngine
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.rollout.sampling import completion_seed
from megatron_rlt.store.parts import PartStore, holds_rows_of
from megatron_rlt.store.run_folder import check_run_folder, lasting_values, write_run_folder
from megatron_rlt.store.verdicts import SCHEMA, VerdictRow
from megatron_rlt.types import ENDED_EARLY, FinishReason, OnProgress

_COMMAND = "evaluate"


_SHOWN = ("correct_share", "completion_tokens", "truncated_share")


_DIGITS = 16  # of a hash that a person may have to read: 64 bits


VERDICTS, PARTS, REJECTED = "verdicts.parquet", "parts", "rejected.jsonl"
"""Files and folders in the run folder, beside `results.json`."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnsweringRooms:
    """Everything that answering a part calls."""

    seed: int
    num_samples: int
    prompter: Prompter
    engine: MegatronEngine
    judge: AnswerJudge
    on_progress: OnProgress


def run_evaluate(config: EvaluateConfig, heartbeat: Heartbeat) -> int:
    """Answer all questions, or continue after the last complete part. Collective; returns the exit status.

    Raises:
        ValueError: tokenizer, set or run folder cannot be used, or no row is usable; before any weight is loaded.
    """
    end = EndRequest()
    check_run_folder(config.output_dir, _COMMAND, config)
    heartbeat.beat("validate")
    asked = evaluation_set(config)
    fingerprint = model_fingerprint(config.model.model, lambda name: heartbeat.beat("validate", name))
    identity = evaluation_identity(config, asked, fingerprint)
    store = PartStore(config.output_dir / PARTS, SCHEMA, identity)
    store.check()
    is_finished = holds_rows_of(config.output_dir / VERDICTS, identity)
    dist.barrier()  # every rank has looked before one writes
    run = PartRun(_COMMAND, config.output_dir, config.metrics, heartbeat=heartbeat, end=end)
    if not is_finished and not _answer_all(config, asked, store, run, heartbeat):
        return ENDED_EARLY
    if dist.get_rank() == 0:
        if is_finished:
            print(f"Nothing to do: {config.output_dir / VERDICTS} holds these verdicts already")
        heartbeat.beat("write")
        results = write_results(
            config, asked, fingerprint, verdicts=config.output_dir / VERDICTS, rejected=config.output_dir / REJECTED
        )
        store.remove()
        print_results(results, config, totals=run.totals, console=Console())
    return 0


def _answer_all(
    config: EvaluateConfig, asked: EvaluationSet, store: PartStore, run: PartRun, heartbeat: Heartbeat
) -> bool:
    """All parts that are not done, joined in the end; False if the run was asked to end before. Collective."""
    is_writer = dist.get_rank() == 0
    prompter = Prompter(student_format(config.model.model, config.prompts), asked.template, config.prefill_thought)
    timeout_seconds = config.judge_timeout_seconds
    with AnswerJudge(asked.kind, prompter.student.tags, timeout_seconds=timeout_seconds) as judge:
        survey, exercises = survey_exercises(
            asked,
            config.countdown,
            ExerciseCheck(prompter, judge.check, config.prompts.max_prompt_tokens),
            lambda row: heartbeat.beat("validate", f"row {row}"),
        )
        num_done = broadcast_record(_begin(config, store, survey) if is_writer else 0, source_rank=0, group=world())
        heartbeat.beat("load")
        rooms = build_rooms(config, prompter, judge, lambda detail: heartbeat.beat(heartbeat.phase, detail))

        def take_part(number: int, timer: PhaseTimer) -> dict[str, float]:
            first = number * config.questions_per_part
            rows = answer_part(rooms, exercises[first : first + config.questions_per_part], timer)
            with timer.phase("write"):
                if is_writer:
                    store.write(number, [row.cells() for row in rows])
            return _means(rows)

        num_parts = math.ceil(len(exercises) / config.questions_per_part)
        is_done = run.run(take_part, num_done=num_done, num_parts=num_parts, shown=_SHOWN)
    if is_done and is_writer:
        store.join(config.output_dir / VERDICTS, num_parts)
    return is_done


def evaluation_identity(config: EvaluateConfig, asked: EvaluationSet, fingerprint: str) -> dict[str, object]:
    """What must be equal for two runs to give the same verdicts, by the names a refusal uses."""
    identity: dict[str, object] = {**lasting_values(config.model_dump(mode="json")), "content of model": fingerprint}
    if asked.source is not None:
        identity["content of data (SHA-256)"] = source_digest(asked.source)[:_DIGITS]
    return identity


def build_rooms(
    config: EvaluateConfig, prompter: Prompter, judge: AnswerJudge, on_progress: OnProgress
) -> AnsweringRooms:
    """Load the model in its layout. Collective; raises ValueError for a folder that does not fit."""
    layout = build_layout(config.model.layout)
    model = load_frozen_model(config.model, layout)
    sampling = config.sampling
    engine = MegatronEngine(
        model,
        layout,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        greedy=sampling.greedy,
        num_token_ids=min(model.unpadded_vocab_size, prompter.student.tokenizer.num_ids),
        max_completion_tokens=sampling.max_completion_tokens,
        max_batch_size=sampling.max_batch_size,
        max_prefill_tokens=sampling.max_prefill_tokens,
        stop=prompter.student.solving_stop(),
        on_progress=on_progress,
    )
    return AnsweringRooms(config.seed, sampling.num_samples, prompter, engine, judge, on_progress)


def answer_part(rooms: AnsweringRooms, exercises: Sequence[Exercise], timer: PhaseTimer) -> list[VerdictRow]:
    """Ask and judge. Collective: every rank passes the same exercises and gets all rows back, question by question."""
    asked = [(exercise, sample) for exercise in exercises for sample in range(rooms.num_samples)]
    with timer.phase("prompts"):
        prompts = [rooms.prompter.token_ids(exercise) for exercise in exercises]
        # By the row in its source: which other rows were rejected, or stand in this part, changes no answer.
        requests = [
            SampleRequest(prompt, completion_seed(rooms.seed, 0, exercise.row, sample))
            for exercise, prompt in zip(exercises, prompts, strict=True)
            for sample in range(rooms.num_samples)
        ]
    with timer.phase("rollout") as phase:
        completions = rooms.engine.generate(requests, policy_version=0)
        model_flops = rooms.engine.model_flops([request.token_ids for request in requests], completions)
        phase.count(sum(len(completion.token_ids) for completion in completions), model_flops)
    with timer.phase("judge"):
        texts = [rooms.prompter.student.completion_text(c.token_ids.tolist()) for c in completions]
        problems = [exercise.problem for exercise, _ in asked]
        verdicts = judge_on_ranks(rooms.judge, problems, texts, rooms.on_progress)
    return [
        VerdictRow(
            id=exercise.problem.problem_id,
            sample=sample,
            question=rooms.prompter.asked(exercise),
            completion=text,
            answer=verdict.answer,
            reference=exercise.problem.solution,
            correct=verdict.correct,
            reason=verdict.reason,
            tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
            seed=completion.seed,
        )
        for (exercise, sample), completion, text, verdict in zip(asked, completions, texts, verdicts, strict=True)
    ]


def _begin(config: EvaluateConfig, store: PartStore, survey: Survey) -> int:
    """The writing rank's beginnings: run folder, log, rejected rows, parts. Returns the number of parts done."""
    write_run_folder(config.output_dir, _COMMAND, config, world_size=dist.get_world_size())
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("megatron_rlt").setLevel(logging.INFO)
    num_done = store.begin()
    rejected = config.output_dir / REJECTED
    write_rejected(rejected, survey)
    logger.info(
        "%s: %d questions, %d answers to sample; %s",
        config.data,
        survey.num_usable,
        survey.num_usable * config.sampling.num_samples,
        survey.describe_rejected(rejected),
    )
    if num_done:
        logger.info("%d parts of %d questions are done already", num_done, config.questions_per_part)
    return num_done


def _means(rows: Sequence[VerdictRow]) -> dict[str, float]:
    return {
        "correct_share": Tally.of(row.correct for row in rows).mean,
        "completion_tokens": Tally.of(row.tokens for row in rows).mean,
        "truncated_share": Tally.of(row.finish_reason is FinishReason.LENGTH for row in rows).mean,
    }
