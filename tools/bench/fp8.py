"""What an FP8 student costs in truth: `python -m tools.bench.fp8 RUN/explanations.parquet --config RUN/config.yaml`.

Scores stored explanations again with their student in float32 on the same bfloat16 weights, in bfloat16 and in every
FP8 recipe, with the stored log-probs of the teacher. Prints errors of tokens and rewards, noise within groups, rank
correlations, advantages that change sign, and how far pack-mates move a score; writes them with bootstrap intervals
over groups. Real FP8 where there is a GPU with Transformer Engine, else (and with --emulate) the emulation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

if "--emulate" in sys.argv:
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # before anything imports Megatron

import torch
import yaml
from rich.console import Console
from torch import Tensor

from megatron_rlt.config.display import NumberTable
from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.config.models import LayoutConfig, ModelConfig, ScoringConfig
from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.config.reward import RewardConfig
from megatron_rlt.jobs.run.load_models import load_frozen_model
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.parallel.platform import device_name, stop_distributed
from megatron_rlt.prompts.pairs import student_format
from megatron_rlt.rewards.rlt import rlt_reward
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.store.explanation_row import StoredExplanation
from megatron_rlt.store.explanations import read_explanations, reward_settings
from megatron_rlt.types import Problem, Reward, SpannedSequence
from tools.bench.machine import describe_machine
from tools.bench.score_noise import Scores, compare, worse_than
from tools.bench.workload import start_single_rank

_EXACT = "float32"
WAYS: dict[str, Fp8Config | None] = {
    _EXACT: None,
    "bf16": None,
    "blockwise": Fp8Config(),
    "blockwise, power of two": Fp8Config(scales="power_of_two"),
    "tensorwise": Fp8Config(recipe="tensorwise"),
    "mxfp8": Fp8Config(recipe="mxfp8"),
    "storage (W8A16)": Fp8Config(activations=False),
    "blockwise, fc2 bf16": Fp8Config(bf16_linears=("fc2",)),
    "blockwise, 2 + 2 layers bf16": Fp8Config(bf16_layers_at_ends=2),
}
_OTHER_SCALES = ("blockwise, power of two", "mxfp8")  # not in a process with float32 scales; mxfp8 needs Blackwell
_NUM_PROBED = 16  # sequences that are scored alone and with mates


def main() -> int:
    arguments = _arguments()
    start_single_rank()
    rows = [row for file in arguments.explanations for row in read_explanations(file, with_tokens=True)]
    rows = [row for row in rows if row.reward is not None and row.student_solution_logprobs is not None]
    reward = reward_settings(arguments.explanations[0])
    if not rows or reward is None:
        raise SystemExit(
            "no row of these files has a reward: give explanations that `collect`, `score` or `train` scored"
        )
    sequences, temperature = _sequences(arguments, rows), rows[0].temperature
    questions = torch.tensor([group_number((row.step, row.question_index)) for row in rows])
    record: dict[str, Any] = {"command": " ".join(["python -m tools.bench.fp8", *sys.argv[1:]])}
    record |= {"machine": describe_machine(), "device": device_name(), "emulated": _is_emulated()}
    record |= {
        "student": str(_student(arguments, rows)),
        "groups": len(torch.unique(questions)),
        "explanations": len(rows),
    }
    record |= {"explanation_tokens": sum(row.explanation_tokens for row in rows), "ways": {}, "failed": {}}
    exact: Scores | None = None
    broken: dict[str, list[str]] = {}
    for way in arguments.ways:
        start = perf_counter()
        try:
            engine = _engine(arguments, way, _student(arguments, rows), temperature)
            found = _scores(engine, sequences, rows, reward)
        except (AssertionError, RuntimeError) as error:  # a recipe that this card or this model's sizes do not have
            record["failed"][way] = str(error)[:500]
            print(way, "failed:", record["failed"][way], flush=True)
            continue
        exact = exact or found
        figures = compare(found, exact, questions) | {"pack_mates": _pack_mates(engine, sequences)}
        record["ways"][way] = figures | {"seconds": perf_counter() - start}
        broken |= {way: worse_than(figures, _limits(arguments)) if way != _EXACT else []}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(way, json.dumps(record["ways"][way]), flush=True)
    stop_distributed()
    _print(record)
    for way, faults in broken.items():
        for fault in faults:
            print(f"{way}: {fault}")
    return 1 if record["failed"] or any(broken.values()) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("explanations", type=Path, nargs="+", help="scored explanations of collect, score or train")
    parser.add_argument("--config", type=Path, required=True, help="config.yaml of that run: its prompts are used")
    parser.add_argument("--student", type=Path, help="model folder; otherwise the one that the rows name")
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=None, help="the first is what others compare with"
    )
    parser.add_argument("--emulate", action="store_true", help="emulate FP8 also where there is a GPU")
    parser.add_argument("--pack-tokens", type=int, default=16384)
    parser.add_argument("--noise", type=float, help="status 1 if the noise share is above, in any way but the first")
    parser.add_argument("--spearman", type=float, help="status 1 if the mean rank correlation is below")
    parser.add_argument("--flips", type=float, help="status 1 if more signs of large advantages flip")
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench_fp8.json"))
    arguments = parser.parse_args()
    if arguments.ways is None:
        arguments.ways = [way for way in WAYS if _is_emulated() or way not in _OTHER_SCALES]
    return arguments


def _is_emulated() -> bool:
    return not torch.cuda.is_available() or sys.modules.get("transformer_engine") is None


def _student(arguments: argparse.Namespace, rows: Sequence[StoredExplanation]) -> Path:
    return arguments.student or Path(rows[0].student or "")


def group_number(key: tuple[int | None, int]) -> int:
    """A number per group: questions of different training steps are different groups."""
    return (key[0] or 0) * 1_000_003 + key[1]


def _sequences(arguments: argparse.Namespace, rows: Sequence[StoredExplanation]) -> list[SpannedSequence]:
    """What the student reads of each row: the sampled ids of the explanation between its tags."""
    given = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))["prompts"]
    formats = student_format(_student(arguments, rows), PromptConfig.model_validate(given))
    return [formats.splice(Problem(row.id, row.question, row.solution), _explanation_ids(row)) for row in rows]


def _explanation_ids(row: StoredExplanation) -> Tensor:
    assert row.explanation_ids is not None, "rows with a reward have their ids"
    return row.explanation_ids


def _engine(arguments: argparse.Namespace, way: str, student: Path, temperature: float) -> LogprobEngine:
    dtype = "float32" if way == _EXACT else "bfloat16"
    config = ModelConfig(model=student, dtype=dtype, fp8=WAYS[way])  # type: ignore[arg-type]
    model = load_frozen_model(config, build_layout(LayoutConfig()))
    return LogprobEngine(
        model, temperature=temperature, scoring=ScoringConfig(max_tokens_per_pack=arguments.pack_tokens)
    )


def _scores(
    engine: LogprobEngine, sequences: list[SpannedSequence], rows: Sequence[StoredExplanation], reward: RewardConfig
) -> Scores:
    values = engine.logprobs(sequences).values
    split = [sequence.split(one) for sequence, one in zip(sequences, values, strict=True)]
    rewards = tuple(_reward(row, parts[0], parts[1], reward) for row, parts in zip(rows, split, strict=True))
    return Scores(torch.cat(values), _top_ids(engine, sequences), rewards)


def _reward(row: StoredExplanation, explanation: Tensor, solution: Tensor, reward: RewardConfig) -> Reward:
    """The row's reward with other log-probs of the student; all else is as stored."""
    evidence = row.evidence(exact_kl=reward.kl_estimator == "full")
    assert evidence is not None, "rows with a reward have its evidence"
    return rlt_reward(
        replace(evidence, student_explanation_logprobs=explanation, student_solution_logprobs=solution), reward
    )


@torch.no_grad()
def _top_ids(engine: LogprobEngine, sequences: list[SpannedSequence]) -> Tensor:
    """`[N]` the student's most probable token at each scored place."""
    weight = engine.model.output_weight()
    found = []
    for hidden in engine.hidden(sequences):
        logits = hidden.to(weight.device, weight.dtype) @ weight.t()
        found.append(logits[:, : engine.model.unpadded_vocab_size].argmax(-1).cpu())
    return torch.cat(found)


def _pack_mates(engine: LogprobEngine, sequences: list[SpannedSequence]) -> dict[str, float]:
    """How far log-probs of single sequences move: with two mates, with mates of random ids; and between equal calls."""
    generator = torch.Generator().manual_seed(0)
    gaps: dict[str, list[Tensor]] = {"two mates": [], "random mates": [], "again": []}
    for index in range(min(_NUM_PROBED, len(sequences) - 2)):
        one, mates = sequences[index], sequences[index + 1 : index + 3]
        noise = [
            replace(
                mate, token_ids=torch.randint(0, engine.model.unpadded_vocab_size, (len(mate),), generator=generator)
            )
            for mate in mates
        ]
        alone = engine.logprobs([one]).values[0]
        for name, pack in (("two mates", [one, *mates]), ("random mates", [one, *noise]), ("again", [one])):
            gaps[name].append((engine.logprobs(pack).values[0] - alone).abs())
    return {name: float(torch.cat(values).mean()) for name, values in gaps.items() if values}


def _limits(arguments: argparse.Namespace) -> dict[str, float]:
    given = {"noise": arguments.noise, "spearman": arguments.spearman, "flips": arguments.flips}
    return {name: limit for name, limit in given.items() if limit is not None}


def _print(record: dict[str, Any]) -> None:
    headings = (
        "scorer",
        "token mean",
        "p99",
        "reward rms",
        "noise / std",
        "Spearman",
        "worst",
        "flips",
        "top-1",
        "mates",
    )
    table = NumberTable(f"{record['explanations']} explanations in {record['groups']} groups", headings)
    for way, figures in record["ways"].items():
        error, ranks = figures["token_error"], figures["spearman"]
        table.add_line(
            way,
            f"{error['mean']:.3f}",
            f"{error['p99']:.2f}",
            f"{figures['reward_rms_error']:.3f}",
            f"{figures['noise_share']['mean']:.3f}",
            f"{ranks['mean']:.3f}",
            f"{ranks['worst']:.3f}",
            f"{figures['sign_flips_of_large']:.1%}",
            f"{figures['top1_agreement']:.1%}",
            f"{figures['pack_mates'].get('two mates', 0.0):.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
