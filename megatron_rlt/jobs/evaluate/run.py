"""`megatron-rlt evaluate`: samples a model's answers to questions, part by part, and judges each answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from rich.console import Console

from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.config.commands.evaluation_sets import EvaluationSet
from megatron_rlt.config.folders.description import tokenizer_in
from megatron_rlt.data.exercises import Exercise
from megatron_rlt.jobs.evaluate.report import print_results, write_results
from megatron_rlt.jobs.evaluate.rows import ExerciseCheck, Prompter, validate_exercises
from megatron_rlt.jobs.reward.judging import AnswerJudge, judge_on_ranks
from megatron_rlt.jobs.run.fingerprints import model_fingerprint, rows_fingerprint
from megatron_rlt.jobs.run.frame import log_to_stdout
from megatron_rlt.jobs.run.load_models import load_frozen_model
from megatron_rlt.jobs.run.part_loop import PartRun
from megatron_rlt.jobs.run.signals import EndRequest
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.prompts.pairs import student_format
from megatron_rlt.rollout.megatron.engine import MegatronEngine
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.rollout.sampling import completion_seed
from megatron_rlt.store.parts import PartStore
from megatron_rlt.store.run_folder import check_run_folder, resume_fixed_values, write_run_folder
from megatron_rlt.store.verdicts import SCHEMA, VerdictRow
from megatron_rlt.types import ENDED_EARLY, FinishReason, OnProgress

_COMMAND = "evaluate"
_SHOWN = ("correct_share", "completion_tokens", "truncated_share")
VERDICTS, PARTS, REJECTED = "verdicts.parquet", "parts", "rejected.jsonl"
"""Files and folders in the run folder, beside `results.json`."""


@dataclass(frozen=True)
class EvaluateContext:
    """Engine, prompts, judge and settings used by `answer_part`."""

    seed: int
    num_samples: int
    prompter: Prompter
    engine: MegatronEngine
    judge: AnswerJudge
    on_progress: OnProgress


def run_evaluate(config: EvaluateConfig, heartbeat: Heartbeat) -> int:
    """Answer all questions, or continue after the last complete part. Collective; returns the exit status.

    Raises ValueError, before loading weights, if tokenizer, set or run folder cannot be used or no row is usable.
    """
    end = EndRequest(config.output_dir)
    check_run_folder(config.output_dir, _COMMAND, config)
    log_to_stdout()
    heartbeat.beat("validate")
    asked = config.evaluation_set
    fingerprint = model_fingerprint(config.model.model, heartbeat.on_progress)
    identity = evaluation_identity(config, asked, fingerprint)
    store = PartStore(
        config.output_dir / PARTS, SCHEMA, identity, output=config.output_dir / VERDICTS, key="output_dir"
    )
    is_finished = store.is_finished()
    dist.barrier()  # every rank checks before one writes
    run = PartRun(config.metrics, heartbeat=heartbeat, end=end)
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
    """Do the remaining parts and join them; returns False if ended by request before. Collective."""
    is_writer = dist.get_rank() == 0
    prompter = Prompter(
        student_format(tokenizer_in(config.model.model), config.prompts), asked.template, config.prefill_thought
    )
    timeout_seconds = config.judge_timeout_seconds
    with AnswerJudge(asked.kind, prompter.student.tags, timeout_seconds=timeout_seconds) as judge:
        check = ExerciseCheck(prompter, judge.check, config.prompts.max_prompt_tokens)
        report, exercises = validate_exercises(asked, config.countdown, check, heartbeat.on_progress)
        if is_writer:
            write_run_folder(config.output_dir, _COMMAND, config, world_size=dist.get_world_size())
        num_answers = report.num_usable * config.sampling.num_samples
        described = f"{config.data}: {report.num_usable} questions, {num_answers} answers to sample"
        (num_done,) = run.begin((store,), report, config.output_dir / REJECTED, asked=described)
        heartbeat.beat("load")
        context = build_context(config, prompter, judge, heartbeat.on_progress)

        def take_part(number: int, timer: PhaseTimer) -> dict[str, float]:
            first = number * config.questions_per_part
            rows = answer_part(context, exercises[first : first + config.questions_per_part], timer)
            with timer.phase("write"):
                if is_writer:
                    store.write(number, [row.cells() for row in rows])
            return _means(rows)

        num_parts = math.ceil(len(exercises) / config.questions_per_part)
        is_done = run.run(
            take_part, title=_COMMAND, folder=config.output_dir, num_done=num_done, num_parts=num_parts, shown=_SHOWN
        )
    if is_done and is_writer:
        store.join(num_parts, {})
    return is_done


def evaluation_identity(config: EvaluateConfig, asked: EvaluationSet, fingerprint: str) -> dict[str, object]:
    """Values that must be equal to continue the same evaluation, by their names in errors. Collective."""
    identity = resume_fixed_values(config.model_dump(mode="json")) | {"content of model": fingerprint}
    if asked.source is not None:
        identity["content of data (SHA-256)"] = rows_fingerprint(asked.source)
    return identity


def build_context(
    config: EvaluateConfig, prompter: Prompter, judge: AnswerJudge, on_progress: OnProgress
) -> EvaluateContext:
    """Load the model in its layout. Collective; raises ValueError for a folder that does not fit."""
    model = load_frozen_model(config.model, build_layout(config.model.layout))
    sampling = config.sampling
    engine = MegatronEngine(
        model,
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
    return EvaluateContext(config.seed, sampling.num_samples, prompter, engine, judge, on_progress)


def answer_part(context: EvaluateContext, exercises: Sequence[Exercise], timer: PhaseTimer) -> list[VerdictRow]:
    """Sample and judge answers. Collective: every rank passes the same exercises and gets all rows, by question."""
    with timer.phase("prompts"):
        prompts = [context.prompter.token_ids(exercise) for exercise in exercises]
        samples = range(context.num_samples)
        asked = [(*row, sample) for row in zip(exercises, prompts, strict=True) for sample in samples]
        # Seeded by the row in its source, so that rejected rows and the part size change no answer.
        requests = [
            SampleRequest(prompt, completion_seed(context.seed, 0, exercise.row, sample))
            for exercise, prompt, sample in asked
        ]
    with timer.phase("rollout") as phase:
        completions = context.engine.generate(requests, policy_version=0)
        model_flops = context.engine.model_flops([request.token_ids for request in requests], completions)
        phase.count(sum(len(completion.token_ids) for completion in completions), model_flops)
    with timer.phase("judge"):
        texts = [context.prompter.student.completion_text(c.token_ids.tolist()) for c in completions]
        problems = [exercise.problem for exercise, *_ in asked]
        verdicts = judge_on_ranks(context.judge, problems, texts, context.on_progress)
    return [
        VerdictRow(
            id=exercise.problem.problem_id,
            sample=sample,
            question=context.prompter.asked(exercise),
            completion=text,
            answer=verdict.answer,
            reference=exercise.problem.solution,
            correct=verdict.correct,
            reason=verdict.reason,
            tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
            seed=completion.seed,
        )
        for (exercise, _, sample), completion, text, verdict in zip(asked, completions, texts, verdicts, strict=True)
    ]


def _means(rows: Sequence[VerdictRow]) -> dict[str, float]:
    return {
        "correct_share": Tally.of(row.correct for row in rows).mean,
        "completion_tokens": Tally.of(row.tokens for row in rows).mean,
        "truncated_share": Tally.of(row.finish_reason is FinishReason.LENGTH for row in rows).mean,
    }
