"""`megatron-rlt rlvr`: a student's own RL with verifiable rewards. What a step does stands in `step.py`."""

from __future__ import annotations

from collections import Counter

from megatron_rlt.config.commands.rlvr import RlvrConfig
from megatron_rlt.config.folders.description import tokenizer_in
from megatron_rlt.jobs.reward.judging import AnswerJudge, answer_tags
from megatron_rlt.jobs.rl.engines import build_learner, sampling_engine
from megatron_rlt.jobs.rl.learner import Learner
from megatron_rlt.jobs.rlvr.step import RlvrContext, RlvrStep, rlvr_step
from megatron_rlt.jobs.run.load_models import load_model, memory_usage
from megatron_rlt.jobs.run.problems import open_problems
from megatron_rlt.jobs.run.training_loop import TrainingRun
from megatron_rlt.jobs.run.training_state import TrainingState
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.prompts.pairs import student_format
from megatron_rlt.prompts.student import StudentFormat
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import OnProgress, Problem

_SHOWN = ("reward", "accuracy", "well_formed_share", "replaced_groups", "completion_tokens")


def run_rlvr(config: RlvrConfig, heartbeat: Heartbeat) -> int:
    """Train a student on its own answers, or continue where its run folder stops. Collective; returns the exit status.

    Raises ValueError before any weight is loaded if model, data, solutions and run folder do not go together.
    """
    run = TrainingRun(config, "rlvr", heartbeat, trained="student")
    student = student_format(tokenizer_in(config.student.model), config.prompts)
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
        context = build_context(config, student, judge, run.on_progress)

    run.watch_memory(lambda: memory_usage(context.learner.policy, (context.learner.reference_model,), context.rollout))

    def take_step(number: int) -> dict[str, float]:
        result = rlvr_step(context, stream.next_batch, number, run.timer)
        with run.timer.phase("record"):
            return rlvr_metrics(result, context.learner) | context.rollout.take_metrics()

    state = TrainingState(context.learner.policy, context.learner.reference_model, stream)
    with judge:
        return run.train(state, take_step, num_steps=config.num_steps, shown=_SHOWN)


def build_context(
    config: RlvrConfig, student: StudentFormat, judge: AnswerJudge, on_progress: OnProgress
) -> RlvrContext:
    """Load the model and bind the engines to it. Collective; raises ValueError for a folder that does not fit."""
    model = load_model(config.student, build_layout(config.student.layout))
    old_policy = LogprobEngine(model, temperature=config.temperature, scoring=config.scoring, on_progress=on_progress)
    return RlvrContext(
        seed=config.seed,
        verifier=config.verifier,
        student=student,
        tags=answer_tags(student.tags),
        judge=judge,
        rollout=sampling_engine(
            config,
            config.student,
            model,
            num_token_ids=min(student.tokenizer.num_ids, model.unpadded_vocab_size),
            stop=student.solving_stop(),
            on_progress=on_progress,
        ),
        learner=build_learner(config, config.student, old_policy, student.tokenizer.decode, on_progress),
        on_progress=on_progress,
    )


def rlvr_metrics(result: RlvrStep, learner: Learner) -> dict[str, float]:
    """Everything worth a curve, over the completions of all ranks that were trained on."""
    verdicts = [verdict for one in result.judged for verdict in one.verdicts]
    completions = result.learned.completions
    lengths = Tally.of(len(one.completion.token_ids) for one in completions)
    return {
        "reward": Tally.of(one.reward for one in completions).mean,
        "accuracy": Tally.of(float(verdict.correct) for verdict in verdicts).mean,
        "well_formed_share": Tally.of(float(form) for one in result.judged for form in one.well_formed).mean,
        "groups_with_signal": float(sum(one.has_signal for one in result.judged)),
        "replaced_groups": float(result.num_replaced),
        "completion_tokens": lengths.mean,
        "completion_tokens_max": lengths.maximum,
        **{f"verdict/{reason}": float(count) for reason, count in Counter(v.reason for v in verdicts).items()},
        **learner.metrics(result.learned),
    }
