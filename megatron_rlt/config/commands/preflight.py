"""Everything that can be known to be wrong before a model loads or torch is imported, all of it at once.

In: a command's configuration. Out: the shapes of its models, read from their `config.json`; or one ValueError
with a line for every broken rule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_rlt.config.architecture import Architecture, ModelShape
from megatron_rlt.config.commands.collect import CollectConfig, collect_faults, collect_path_faults
from megatron_rlt.config.commands.evaluate import EvaluateConfig, evaluate_faults, evaluate_path_faults, evaluation_set
from megatron_rlt.config.commands.prepare import PrepareConfig, prepare_path_faults
from megatron_rlt.config.commands.reweigh import ReweighConfig, reweigh_path_faults
from megatron_rlt.config.commands.rlvr import SolverConfig, solver_path_faults, verifier_faults
from megatron_rlt.config.commands.score import ScoreConfig, score_faults, score_path_faults
from megatron_rlt.config.commands.sft import SftConfig, sft_faults, sft_path_faults
from megatron_rlt.config.commands.train import TrainConfig, students_faults, train_faults, train_path_faults
from megatron_rlt.config.rules import Shapes
from megatron_rlt.config.sections import ModelConfig


def check_train(config: TrainConfig) -> Shapes:
    """Check `train`; raises ValueError with one line a broken rule."""
    shapes, unreadable = _read_shapes(config.models)
    _raise_if_any([*train_path_faults(config), *unreadable, *train_faults(config, shapes), *students_faults(config)])
    return shapes


def check_solver(config: SolverConfig) -> Shapes:
    """Check `train` with a verifiable reward; raises ValueError with one line a broken rule."""
    shapes, unreadable = _read_shapes(config.models)
    _raise_if_any([*solver_path_faults(config), *unreadable, *train_faults(config, shapes), *verifier_faults(config)])
    return shapes


def check_sft(config: SftConfig) -> Shapes:
    """Check `sft`; raises ValueError with one line a broken rule."""
    shapes, unreadable = _read_shapes({"model": config.model})
    _raise_if_any([*sft_path_faults(config), *unreadable, *sft_faults(config, shapes)])
    return shapes


def check_score(config: ScoreConfig) -> Shapes:
    """Check `score`; raises ValueError with one line a broken rule."""
    shapes, unreadable = _read_shapes({"teacher": config.teacher, "student": config.student})
    _raise_if_any([*score_path_faults(config), *unreadable, *score_faults(config, shapes)])
    return shapes


def check_collect(config: CollectConfig) -> Shapes:
    """Check `collect`; raises ValueError with one line a broken rule."""
    shapes, unreadable = _read_shapes(config.models)
    _raise_if_any([*collect_path_faults(config), *unreadable, *collect_faults(config, shapes)])
    return shapes


def check_evaluate(config: EvaluateConfig) -> Shapes:
    """Check `evaluate`; raises ValueError with one line a broken rule."""
    shapes, unreadable = _read_shapes({"model": config.model})
    _raise_if_any([*evaluate_path_faults(config), *unreadable, *evaluate_faults(config, shapes)])
    return shapes


def check_prepare(config: PrepareConfig) -> None:
    """Check `prepare`; raises ValueError with one line a broken rule."""
    _raise_if_any(prepare_path_faults(config))


def check_reweigh(config: ReweighConfig) -> None:
    """Check `reweigh`; raises ValueError with one line a broken rule."""
    _raise_if_any(reweigh_path_faults(config))


def count_rows(data: Path) -> int | None:
    """Rows of a JSONL file, good or bad, or of prepared shards by their index; None where only reading would tell."""
    if data.suffix == ".jsonl":
        with data.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    index = data / ".nv-meta" / ".info.json"
    if not index.is_file():
        return None
    counts: dict[str, int] = json.loads(index.read_text(encoding="utf-8"))["shard_counts"]
    return sum(counts.values())


def count_questions(config: EvaluateConfig) -> int | None:
    """Questions that `evaluate` will find, good or bad; None where only reading would tell."""
    asked = evaluation_set(config)
    if asked.source is None:
        return asked.num_generated
    return count_rows(Path(asked.source))


def _read_shapes(models: Mapping[str, ModelConfig]) -> tuple[dict[str, ModelShape], list[str]]:
    shapes: dict[str, ModelShape] = {}
    faults = []
    for name, model in models.items():
        if not model.model.is_dir():
            continue  # the path rules say so
        try:
            shapes[name] = Architecture.from_folder(model.model)
        except ValueError as error:
            faults.append(f"{name}.model: {error}")
    return shapes, faults


def _raise_if_any(faults: list[str]) -> None:
    if faults:
        raise ValueError("\n".join(faults))
