"""What the test ranks' fork server imports once. No threads may start here."""

import megatron.core.distributed
import megatron.core.models.gpt.gpt_model
import megatron.core.optimizer
import megatron.core.pipeline_parallel  # noqa: F401
import torch
import transformers  # noqa: F401

torch.set_num_threads(1)
