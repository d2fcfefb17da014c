"""Megatron's DistributedDataParallel, distributed optimizer and learning-rate schedule around a model."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_rlt.config.training import OptimizerConfig, num_warmup_updates
from megatron_rlt.models.language_model import LanguageModel


def wrap_for_training(model: LanguageModel) -> DistributedDataParallel:
    """Wrap the model with fp32 gradient buffers, reduce-scattered over data-parallel ranks.

    Losses carry their own global denominator, so Megatron must not average: `calculate_per_token_loss` disables that
    over micro-batches and ranks, and gradients are finalised without a token count.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=torch.cuda.is_available()
    )
    assert model.config.calculate_per_token_loss, "the model must be built for losses with their own denominator"
    with model.layout:
        wrapped = DistributedDataParallel(model.config, ddp_config, model)
        wrapped.broadcast_params()
    model.config.no_sync_func = wrapped.no_sync
    # Without this, sequence-parallel norm gradients stay partial sums over tp, without an error.
    model.config.finalize_model_grads_func = _finalize_without_division
    model.train()
    return wrapped


def _finalize_without_division(
    models: list[DistributedDataParallel],
    num_tokens: torch.Tensor | None,
    pg_collection: ProcessGroupCollection | None,
    force_all_reduce: bool,
) -> None:
    assert num_tokens is None or int(num_tokens) == 0, "losses must be shares of the global loss already"
    finalize_model_grads(models, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)


def build_optimizer(wrapped: DistributedDataParallel, settings: OptimizerConfig) -> MegatronOptimizer:
    """AdamW on Megatron's distributed optimizer; bf16 weights keep an fp32 main copy."""
    dtype = wrapped.config.params_dtype
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    with wrapped.module.layout:
        return get_megatron_optimizer(megatron_config, [wrapped], use_gloo_process_groups=False)


def optimizer_bytes(optimizer: MegatronOptimizer, model: LanguageModel) -> int:
    """Bytes on this rank of the optimizer's moments and main weights; the model's own weights are not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    inner = optimizer.optimizer
    shards = [shard for group in inner.param_groups for shard in group["params"]]
    states = (value for shard in shards for value in inner.state.get(shard, {}).values())
    mains = (shard for shard in shards if shard.untyped_storage().data_ptr() not in own)
    return sum(value.nbytes for value in (*states, *mains) if isinstance(value, torch.Tensor))


def build_scheduler(
    optimizer: MegatronOptimizer, settings: OptimizerConfig, *, num_updates: int
) -> OptimizerParamScheduler:
    """Megatron's schedule over the run's `num_updates`, at the first of them.

    Update `n`, from 0, has the rate of position `n`, as with transformers' schedules: without a warm-up the first has
    the peak, the last has more than the minimum, and the first of a warm-up has rate 0.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=num_warmup_updates(settings, num_updates),
        lr_decay_steps=num_updates,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=num_updates,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run uses its own configuration
    )
