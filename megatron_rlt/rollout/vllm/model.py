"""vLLM's copy of the policy inside the trainer's ranks: built without weights, loaded by a weight sync, put to sleep.

One engine spans `tp` neighbouring ranks (vLLM's `external_launcher`: every rank runs the same scheduler and its own
shard); a job has `world size / tp` of them. `colocated.py` samples with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.models.checksum import checksums_held
from megatron_rlt.parallel.environment import prepare_vllm
from megatron_rlt.rollout.vllm.cpu_memory import segments_of_this_job
from megatron_rlt.rollout.vllm.settings import EngineShape

if TYPE_CHECKING:
    from vllm import LLM


class VllmModel:
    """vLLM's model, KV cache and scheduler on this rank. All methods are collective over all ranks."""

    def __init__(self, shape: EngineShape) -> None:
        """Start the engine; its weights are random until `load_weights`.

        Raises:
            ValueError: vLLM refuses the model or the memory; with vLLM's message.
        """
        self.tp = shape.tp
        self._sleep_level = shape.settings.sleep_level
        prepare_vllm(dist.get_rank(), dist.get_world_size(), on_cpu=not shape.on_gpu)
        import vllm
        from vllm.v1.engine import core

        # An engine that is garbage-collected would destroy the process group of the whole job with its own.
        core.cleanup_dist_env_and_memory = torch.cuda.empty_cache
        if not shape.on_gpu:
            torch._dynamo.config.disable = True  # else log-probs wait for a C++ compiler

        logging.getLogger("vllm").setLevel(logging.ERROR)
        try:
            with nullcontext() if shape.on_gpu else segments_of_this_job():
                self._llm: LLM = vllm.LLM(
                    **shape.options(),
                    load_format="dummy",
                    distributed_executor_backend="external_launcher",
                    enable_sleep_mode=shape.on_gpu and self._sleep_level > 0,
                )
        except ValueError as error:
            message = " ".join(str(error).split())
            raise ValueError(f"rollout.engine=vllm: vLLM does not start: {message}") from error
        self.sampling_params = vllm.SamplingParams

    @property
    def keeps_weights(self) -> bool:
        """Whether weights survive `sleep`."""
        return self._sleep_level < 2

    @property
    def cache_bytes(self) -> int:
        """Size of the KV cache on this rank."""
        caches: Sequence[Tensor] = self._runner.kv_caches
        return sum(cache.nbytes for cache in caches)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights by whole tensors under their Hugging Face names, and drop the caches of the old ones.

        The CPU build packs linear weights while it loads them, so only vLLM's own reload may write to them.
        """
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
        self._llm.update_weight_version(str(version))
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop the prefix cache of the old weights")

    def checksums_held(self, names: Sequence[str]) -> list[dict[str, str]]:
        """One entry: checksums of the named weights that this rank holds whole, in the form in which they were sent."""
        return [checksums_held(self._runner.model, list(names))]

    def prompt_logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """`[1, T - 1]` float32: log-probs of all tokens but the first, at temperature 1 over all ids."""
        params = self.sampling_params(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        (output,) = self._llm.generate([{"prompt_token_ids": list(token_ids)}], params, use_tqdm=False)
        rows = output.prompt_logprobs[1:]
        return torch.tensor([[row[token].logprob for row, token in zip(rows, token_ids[1:], strict=True)]])

    def enqueue(self, prompts: Sequence[Sequence[int]], params: Sequence[object]) -> None:
        """Add requests to the scheduler."""
        self._llm.enqueue([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)

    def has_unfinished(self) -> bool:
        """Whether `step` has work to do."""
        return bool(self._llm.llm_engine.has_unfinished_requests())

    def step(self) -> list[object]:
        """Sample one token per running request; returns vLLM's outputs of the requests that ended."""
        return [output for output in self._llm.llm_engine.step() if output.finished]

    def wake(self) -> None:
        """Bring weights and KV cache back to the device."""
        if self._sleep_level > 0:
            self._llm.wake_up()

    def sleep(self) -> None:
        """Free the device's memory for the trainer."""
        if self._sleep_level > 0:
            self._llm.sleep(level=self._sleep_level)

    @property
    def _runner(self) -> Any:  # noqa: ANN401
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
