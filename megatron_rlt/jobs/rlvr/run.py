"""`megatron-rlt train` with a `verifier` section: a student's own RL. What a step does stands in `solver_step.py`."""

from __future__ import annotations

from collections import Counter

from megatron_rlt.config.commands.rlvr import SolverConfig
from megatron_rlt.jobs.reward.judging import AnswerJudge
from megatron_rlt.jobs.reward.score_pairs import logprob_engine
from megatron_rlt.jobs.rl.engines import build_policy, sampling_engine
from megatron_rlt.jobs.rl.grpo import update_metrics
from megatron_rlt.jobs.rl.mismatch import MismatchWatch, logprob_metrics
from megatron_rlt.jobs.rlvr.step import SolverResult, SolverRooms, solver_step
from megatron_rlt.jobs.run.load_models import load_model, load_reference, take_holdings
from megatron_rlt.jobs.run.problems import open_problems
from megatron_rlt.jobs.run.training_loop import TrainingRun, TrainingState
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.prompts.pairs import student_format
from megatron_rlt.prompts.student import StudentFormat
from megatron_rlt.rewards.answers import AnswerTags
from megatron_rlt.types import OnProgress, Problem

_SHOWN = ("reward", "accuracy", "well_formed_share", "replaced_groups", "completion_tokens")


def run_solver(config: SolverConfig, heartbeat: Heartbeat) -> int:
    """Train a student on its own answers, or continue where its run folder stops. Collective; returns the exit status.

    Raises:
        ValueError: model, tokenizer, data, solutions or run folder do not go together; before any weight is loaded.
    """
    run = TrainingRun(config, "train", heartbeat, source_model=config.student.model)
    student = student_format(config.student.model, config.prompts)
    with (
        AnswerJudge(config.verifier.kind, student.tags, timeout_seconds=config.verifier.timeout_seconds) as judge,
        run.timer.phase("setup"),
    ):

        def check(problem: Problem) -> None:
            judge.check(problem)
            prompt = student.solving_prompt(
                problem.problem_id, problem.question, prefill_thought=config.verifier.prefill_thought
            )
            if len(prompt) > config.prompts.max_prompt_tokens:
                raise ValueError(
                    f"problem {problem.problem_id}: its prompt has {len(prompt)} tokens, more than"
                    f" prompts.max_prompt_tokens = {config.prompts.max_prompt_tokens}; drop the row or raise the limit"
                )

        stream = open_problems(config.data, seed=config.seed, work_dir=config.output_dir / "data", check=check)
        rooms = build_solver_rooms(config, student, judge, run.on_progress)

    frozen = () if rooms.reference_model is None else (rooms.reference_model,)
    run.watch_memory(lambda: take_holdings(rooms.policy, frozen, rooms.rollout))

    def take_step(number: int) -> dict[str, float]:
        result = solver_step(rooms, stream.next_batch, number, run.timer)
        with run.timer.phase("record"):
            return solver_metrics(result) | rooms.rollout.take_metrics()

    state = TrainingState(rooms.policy, rooms.reference_model, stream)
    with judge:
        return run.train(state, take_step, num_steps=config.num_steps, shown=_SHOWN)


def build_solver_rooms(
    config: SolverConfig, student: StudentFormat, judge: AnswerJudge, on_progress: OnProgress
) -> SolverRooms:
    """Load the model and bind the engines to it. Collective; raises ValueError for a folder that does not fit."""
    layout = build_layout(config.student.layout)
    model = load_model(config.student, layout)
    reference_model = load_reference(config.student, config.grpo, layout)
    old_policy, reference = (
        None
        if one is None
        else logprob_engine(
            one, layout, temperature=config.temperature, scoring=config.scoring, on_progress=on_progress
        )
        for one in (model, reference_model)
    )
    assert old_policy is not None, "the policy is always asked"
    tags = student.tags
    return SolverRooms(
        seed=config.seed,
        grpo=config.grpo,
        verifier=config.verifier,
        max_completion_tokens=config.rollout.max_completion_tokens,
        student=student,
        tags=AnswerTags(tags.thought_open, tags.thought_close, tags.solution_open, tags.solution_close),
        judge=judge,
        rollout=sampling_engine(
            config,
            config.student,
            model,
            layout,
            temperature=config.temperature,
            num_token_ids=min(student.tokenizer.num_ids, model.unpadded_vocab_size),
            stop=student.solving_stop(),
            on_progress=on_progress,
        ),
        policy=build_policy(config, model, layout, temperature=config.temperature, on_progress=on_progress),
        old_policy=old_policy,
        mismatch=MismatchWatch.of_run(config.mismatch, config.output_dir, student.tokenizer.decode),
        reference=reference,
        reference_model=reference_model,
        on_progress=on_progress,
    )


def solver_metrics(result: SolverResult) -> dict[str, float]:
    """Everything worth a curve, over the completions of all ranks that were trained on."""
    verdicts = [verdict for one in result.judged for verdict in one.verdicts]
    lengths = Tally.of(len(completion.token_ids) for completion in result.completions)
    metrics = {
        "reward": Tally.of(reward for one in result.judged for reward in one.rewards).mean,
        "accuracy": Tally.of(float(verdict.correct) for verdict in verdicts).mean,
        "well_formed_share": Tally.of(float(form) for one in result.judged for form in one.well_formed).mean,
        "groups_with_spread": float(sum(one.has_spread for one in result.judged)),
        "replaced_groups": float(result.num_replaced),
        "advantage_std": float(result.advantages.std()),
        "completion_tokens": lengths.mean,
        "completion_tokens_max": lengths.maximum,
    }
    metrics |= {f"verdict/{reason}": float(count) for reason, count in Counter(v.reason for v in verdicts).items()}
    return metrics | logprob_metrics(result.old_policy, result.mismatch) | update_metrics(result.updates)
