"""The dense oracle: log-probs and reward by plain transformers, whole logits tensors, float64 from the logits on.

Shares no code with the package but its records. `model(input_ids)` is a Hugging Face causal language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_rlt.types import ScoringPair, SpannedSequence


@torch.no_grad()
def dense_distributions(model: Any, sequence: SpannedSequence, temperature: float) -> Tensor:
    """`[N, V]` float64 log-distributions that the sequence's wanted tokens were drawn from."""
    logits = model(sequence.token_ids[None]).logits[0].double() / temperature
    return torch.log_softmax(logits, -1)[sequence.target_positions - 1]


def dense_logprobs(model: Any, sequence: SpannedSequence, temperature: float) -> Tensor:
    """`[N]` float64 log-probs of the wanted tokens, in span order."""
    wanted = sequence.token_ids[sequence.target_positions]
    return dense_distributions(model, sequence, temperature).gather(1, wanted[:, None])[:, 0]


def dense_entropy(model: Any, sequence: SpannedSequence, temperature: float) -> Tensor:
    """`[N]` float64 entropies in nats."""
    distributions = dense_distributions(model, sequence, temperature)
    return -(distributions.exp() * distributions).sum(-1)


def dense_divergence(teacher: Any, student: Any, pair: ScoringPair, temperature: float) -> Tensor:
    """`[E]` float64: KL(teacher || student) at every explanation token, over the whole vocabulary."""
    length = pair.num_explanation_tokens
    log_teacher = dense_distributions(teacher, pair.teacher, temperature)[:length]
    log_student = dense_distributions(student, pair.student, temperature)[:length]
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


def dense_reward(
    teacher: Any,
    student: Any,
    pair: ScoringPair,
    *,
    temperature: float,
    alpha: float,
    lambda_kl: float,
    kl_estimator: str,
    penalty: float = 0.0,
) -> dict[str, float]:
    """The reward and its parts, written as in the paper; neither span may be empty."""
    length = pair.num_explanation_tokens
    teacher_explanation = dense_logprobs(teacher, pair.teacher, temperature)[:length]
    student_logprobs = dense_logprobs(student, pair.student, temperature)
    student_explanation, solution = student_logprobs[:length], student_logprobs[length:]
    if kl_estimator == "k1":
        kl = teacher_explanation - student_explanation
    elif kl_estimator == "k3":
        ratio = torch.exp(student_explanation - teacher_explanation)
        kl = ratio - 1 - torch.log(ratio)
    else:
        kl = dense_divergence(teacher, student, pair, temperature)
    parts = {"r_ss_mean": solution.mean().item(), "r_ss_min": solution.min().item()}
    parts |= {"r_kl_mean": kl.mean().item(), "r_kl_max": kl.max().item()}
    parts["r_ss"] = parts["r_ss_mean"] + alpha * parts["r_ss_min"]
    parts["r_kl"] = parts["r_kl_mean"] + alpha * parts["r_kl_max"]
    parts["reward"] = parts["r_ss"] - lambda_kl * parts["r_kl"] + penalty
    return parts
