"""Megatron's DistributedDataParallel, distributed optimizer and learning-rate schedule around a model."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_rlt.config.plan import num_warmup_updates
from megatron_rlt.config.sections import OptimizerConfig
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import Layout


def wrap_for_training(model: LanguageModel, layout: Layout) -> DistributedDataParallel:
    """Give the model gradient buffers in fp32 whose sum over data-parallel ranks is reduce-scattered.

    Losses carry their own global denominator, so nothing here divides: `calculate_per_token_loss` keeps Megatron
    from averaging over micro-batches and ranks, and gradients are finalised without a token count.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=torch.cuda.is_available(),
    )
    assert model.config.calculate_per_token_loss, "the model must be built for losses with their own denominator"
    with layout:
        wrapped = DistributedDataParallel(model.config, ddp_config, model)
        wrapped.broadcast_params()
    model.config.no_sync_func = wrapped.no_sync
    # Without this, sequence-parallel norm gradients stay partial sums over tp and training drifts in silence.
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


def build_optimizer(wrapped: DistributedDataParallel, layout: Layout, settings: OptimizerConfig) -> MegatronOptimizer:
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
    with layout:
        return get_megatron_optimizer(megatron_config, [wrapped], use_gloo_process_groups=False)


def optimizer_bytes(optimizer: MegatronOptimizer, model: LanguageModel) -> int:
    """Of all tensors that the optimizer holds beside the model's own weights, on this rank."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    inner = optimizer.optimizer
    shards = [shard for group in inner.param_groups for shard in group["params"]]
    states = [
        value for shard in shards for value in inner.state.get(shard, {}).values() if isinstance(value, torch.Tensor)
    ]
    mains = [shard for shard in shards if shard.untyped_storage().data_ptr() not in own]
    return sum(tensor.nbytes for tensor in (*states, *mains))


def build_scheduler(
    optimizer: MegatronOptimizer, settings: OptimizerConfig, *, num_updates: int
) -> OptimizerParamScheduler:
    """Megatron's schedule, already advanced to the first update: its step 0 has rate 0 under a warm-up.

    Args:
        num_updates: optimizer steps of the whole run.
    """
    scheduler = OptimizerParamScheduler(
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
        override_opt_param_scheduler=True,  # a resumed run follows its configuration, not the checkpoint's
    )
    scheduler.step(increment=1)
    return scheduler
