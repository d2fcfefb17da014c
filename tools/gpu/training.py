"""Update and rollout with 7B-shaped layers on one GPU: `python -m tools.gpu.training OUT.json`.

The update is forward, backward and the distributed optimizer's step on packs of completions; the rollout is the
embedded engine's, by how many completions decode together. Peak memory of each stands beside what `plan` predicts, and
of the update also what weights, gradients and optimizer take. Every result is written at once.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rlt.config.models import PAPER_TEMPERATURE, LayoutConfig, ModelConfig, ScoringConfig
from megatron_rlt.config.plan import model_plan
from megatron_rlt.config.training import OptimizerConfig
from megatron_rlt.metrics.phases import peak_flops_per_second
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.parallel.platform import device_name
from megatron_rlt.policy.policy import Policy
from megatron_rlt.rollout.megatron.engine import MegatronEngine
from megatron_rlt.rollout.requests import SampleRequest
from tools.bench.machine import describe_machine
from tools.bench.workload import NeverStop, start_single_rank
from tools.gpu.predicted import predicted_rollout, predicted_update
from tools.gpu.shapes import median_seconds, peak_bytes, random_model, random_sequences, reset_peak, with_layers

_PROMPT_TOKENS, _PREFILL_TOKENS = 256, 16384  # of the rollout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a completion in the update")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of an update")
    parser.add_argument("--pack-tokens", type=int, nargs="+", default=[2048, 16384], help="tokens per pass")
    parser.add_argument("--decode", type=int, nargs="+", default=[16, 128], help="completions that decode together")
    parser.add_argument("--decode-tokens", type=int, default=64, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, for a machine without a GPU")
    arguments = parser.parse_args()
    if arguments.dry:
        arguments.length, arguments.tokens, arguments.rounds, arguments.decode_tokens = 64, 256, 1, 4
    start_single_rank()
    record: dict[str, Any] = {"command": "python -m tools.gpu.training", "machine": describe_machine()}
    record |= {"device": device_name(), "arguments": {k: v for k, v in vars(arguments).items() if k != "out"}}
    architecture, layout = with_layers(arguments.layers, dry=arguments.dry), build_layout(LayoutConfig())
    before = reset_peak()
    model = random_model(architecture, layout)
    for count in arguments.decode:
        record[f"rollout of {count}"] = _rollout(model, count, before, arguments)
        _write(arguments.out, record)
    del model
    for tokens in arguments.pack_tokens:
        before = reset_peak()
        record[f"update in packs of {tokens}"] = _update(random_model(architecture, layout), tokens, before, arguments)
        _write(arguments.out, record)


def _rollout(model: LanguageModel, count: int, before: int, arguments: argparse.Namespace) -> dict[str, Any]:
    engine = MegatronEngine(
        model,
        temperature=PAPER_TEMPERATURE,
        top_p=1.0,
        greedy=False,
        num_token_ids=model.unpadded_vocab_size,
        max_completion_tokens=arguments.decode_tokens,
        max_batch_size=count,
        max_prefill_tokens=_PREFILL_TOKENS,
        stop=NeverStop(),
    )
    prompt = random_sequences(1, _PROMPT_TOKENS, model.unpadded_vocab_size)[0].token_ids
    requests = [SampleRequest(prompt, seed) for seed in range(count)]
    model.eval()
    reset_peak()
    seconds = median_seconds(lambda: engine.generate(requests, 0), rounds=arguments.rounds)
    work = engine.work
    return {
        "tokens_per_second": count * arguments.decode_tokens / seconds,
        "seconds_per_token": work.decode_seconds / arguments.decode_tokens,
        "work": asdict(work),
        "peak_bytes": peak_bytes() - before,
        "predicted_peak_bytes": predicted_rollout(
            model.architecture,
            count=count,
            prompt=_PROMPT_TOKENS,
            completion=arguments.decode_tokens,
            max_prefill_tokens=_PREFILL_TOKENS,
        ),
    }


def _update(model: LanguageModel, pack_tokens: int, before: int, arguments: argparse.Namespace) -> dict[str, Any]:
    model.train()
    policy = Policy(
        model,
        optimizer=OptimizerConfig(lr=1e-6),
        blocks=ScoringConfig(),
        temperature=PAPER_TEMPERATURE,
        max_tokens_per_pack=pack_tokens,
        micro_batch_size=None,
        num_updates=100,
    )
    sequences = random_sequences(arguments.tokens // arguments.length, arguments.length, model.unpadded_vocab_size)
    num_rows = sum(one.num_targets for one in sequences)

    def loss(batch: PackedBatch, logprobs: Tensor, _: Tensor) -> tuple[Tensor, None]:
        del batch
        return -logprobs.sum() / num_rows, None

    reset_peak()
    seconds = median_seconds(lambda: policy.update(sequences, loss), rounds=arguments.rounds)
    flops, peak = policy.model_flops(sequences), peak_flops_per_second(None, device_name())
    planned = model_plan("policy", ModelConfig(model=Path("-")), model.architecture, 1, use="trained")
    return {
        "seconds": seconds,
        "tokens_per_second": arguments.tokens / seconds,
        "tflops_per_second": flops / seconds / 1e12,
        "share_of_bf16_peak": None if peak is None else flops / seconds / peak,
        "peak_bytes": peak_bytes() - before,
        "predicted_peak_bytes": predicted_update(
            model.architecture, num_sequences=len(sequences), length=arguments.length, pack_tokens=pack_tokens
        ),
        "planned_bytes": planned.weight_bytes + planned.gradient_bytes + planned.optimizer_bytes,
    }


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(dict(list(record.items())[-1:])), flush=True)


if __name__ == "__main__":
    main()
