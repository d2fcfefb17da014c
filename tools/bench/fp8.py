"""What an FP8 student costs in truth: `python -m tools.bench.fp8 RUN/explanations.parquet --config RUN/config.yaml`.

Scores stored explanations again with their student in float32 on the same bfloat16 weights, in bfloat16 and in every
FP8 recipe, with the stored log-probs of the teacher. Prints errors of tokens and rewards, noise within groups, rank
correlations, advantages that change sign, and how far pack-mates move a score; writes them with bootstrap intervals
over groups. Real FP8 where there is a GPU with Transformer Engine, else (and with --emulate) the emulation. What tensor
parallelism does to a score: `tools.bench.fp8_layouts`; tables and picture of docs/fp8.md: `tools.bench.fp8_page`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

if "--emulate" in sys.argv:
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # before anything imports Megatron

import torch
from rich.console import Console
from torch import Tensor

from megatron_rlt.config.display import NumberTable
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.parallel.platform import device_name, stop_distributed
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import SpannedSequence
from tools.bench.machine import describe_machine
from tools.bench.score_noise import Scores, compare, worse_than
from tools.bench.stored_scores import EXACT, WAYS, Study, TokenScores, build_engine, read_study, score, with_rewards
from tools.bench.workload import start_single_rank

_OTHER_SCALES = ("blockwise, power of two", "mxfp8")  # not in a process with float32 scales; mxfp8 needs Blackwell
_NUM_PROBED = 3  # sequences, from all parts of the file, that are scored alone and with mates


def main() -> int:
    arguments = _arguments()
    start_single_rank()
    study = read_study(
        arguments.explanations,
        arguments.config,
        arguments.student,
        num_groups=arguments.groups,
        without_penalties=arguments.without_penalties,
    )
    record = _head(study)
    exact: Scores | None = None
    broken: dict[str, list[str]] = {}
    for way in arguments.ways:
        try:
            kept = _scored(study, way, arguments)
        except (AssertionError, RuntimeError) as error:  # a recipe that this card or this model's sizes do not have
            record["failed"][way] = str(error)[:500]
            print(way, "failed:", record["failed"][way], flush=True)
            continue
        found = with_rewards(kept.scores, study)
        exact = exact or found
        figures = compare(found, exact, study.groups, study.token_counts)
        record["ways"][way] = figures | {"pack_mates": kept.pack_mates, "seconds": kept.seconds}
        broken |= {way: worse_than(figures, _limits(arguments)) if way != EXACT else []}
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
    parser.add_argument("--groups", type=int, help="score only the first groups; otherwise all")
    parser.add_argument(
        "--without-penalties", action="store_true", help="leave out what form and leaks add to a reward"
    )
    parser.add_argument("--emulate", action="store_true", help="emulate FP8 also where there is a GPU")
    parser.add_argument("--keep", type=Path, help="folder for the scores, from which another start goes on")
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


def _head(study: Study) -> dict[str, Any]:
    """What the record says before any way is scored."""
    return {
        "command": " ".join(["python -m tools.bench.fp8", *sys.argv[1:]]),
        "machine": describe_machine(),
        "device": device_name(),
        "emulated": _is_emulated(),
        "student": str(study.student),
        "groups": len(torch.unique(study.groups)),
        "explanations": len(study.rows),
        "explanation_tokens": sum(row.explanation_tokens for row in study.rows),
        "scored_tokens": int(study.token_counts.sum()),
        "reward": study.reward.model_dump(mode="json"),
        "ways": {},
        "failed": {},
    }


@dataclass(frozen=True, eq=False)
class _Kept:
    """What takes time: one way's scores."""

    scores: TokenScores
    pack_mates: dict[str, dict[str, float]]
    seconds: float


def _scored(study: Study, way: str, arguments: argparse.Namespace) -> _Kept:
    """One way's scores, from the folder of an earlier start if they are there."""
    file = arguments.keep / f"{list(WAYS).index(way)}.pt" if arguments.keep is not None else None
    if file is not None and file.exists():
        held = torch.load(file, weights_only=True)
        if len(held["tokens"]) != int(study.token_counts.sum()):
            raise SystemExit(f"{file} holds scores of other explanations; give another --keep")
        return _Kept(TokenScores(held["tokens"], held["top_ids"]), held["pack_mates"], held["seconds"])
    start = perf_counter()
    engine = build_engine(study, way, LayoutConfig(), pack_tokens=arguments.pack_tokens)
    kept = _Kept(score(engine, study), _pack_mates(engine, study.sequences), perf_counter() - start)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(kept.scores) | {"pack_mates": kept.pack_mates, "seconds": kept.seconds}, file)
    return kept


def _pack_mates(engine: LogprobEngine, sequences: Sequence[SpannedSequence]) -> dict[str, dict[str, float]]:
    """How far log-probs of single sequences move: with two mates, with mates of random ids; and between equal calls."""
    generator = torch.Generator().manual_seed(0)
    gaps: dict[str, list[Tensor]] = {"two mates": [], "random mates": [], "again": []}
    for index in range(0, len(sequences) - 2, max(len(sequences) // _NUM_PROBED, 1)):
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
    joined = {name: torch.cat(values) for name, values in gaps.items() if values}
    return {name: {"mean": float(values.mean()), "max": float(values.max())} for name, values in joined.items()}


def _limits(arguments: argparse.Namespace) -> dict[str, float]:
    given = {"noise": arguments.noise, "spearman": arguments.spearman, "flips": arguments.flips}
    return {name: limit for name, limit in given.items() if limit is not None}


def _print(record: dict[str, Any]) -> None:
    headings = (
        "scorer",
        "token mean",
        "p99",
        "max",
        "reward rms",
        "noise / std",
        "Spearman",
        "worst",
        "flips",
        "of large",
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
            f"{error['max']:.1f}",
            f"{figures['reward_rms_error']:.3f}",
            f"{figures['noise_share']['mean']:.3f}",
            f"{ranks['mean']:.3f}",
            f"{ranks['worst']:.3f}",
            f"{figures['sign_flips']['mean']:.1%}",
            f"{figures['sign_flips_of_large']['mean']:.1%}",
            f"{figures['top1_agreement']:.1%}",
            f"{figures['pack_mates'].get('two mates', {'mean': 0.0})['mean']:.3f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
