"""Below which spread of its rewards a group teaches nothing, since the students' own noise could have made it all.

The noise is given, or measured once: in the first step the students read some of its explanations again. In: a step's
rewarded explanations. Out: the smallest spread that counts. Every rank holds the same rewards, so all ranks agree.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rlt.algorithm.advantages import is_within_noise, within_group_std
from megatron_rlt.config.models import ModelConfig, ScoringConfig
from megatron_rlt.config.plan import max_rank_parameters
from megatron_rlt.config.reward import StudentsConfig, TrainRewardConfig
from megatron_rlt.jobs.reward.scorer import Scorer, build_scorer
from megatron_rlt.jobs.run.load_models import load_frozen_model
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.metrics.reduce import largest
from megatron_rlt.parallel.platform import free_device_bytes, world
from megatron_rlt.rewards.rlt import combine_students
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Reward, ScoredExplanation

logger = logging.getLogger(__name__)

# Whole groups are read again: at least as many explanations as give the noise to a tenth (1 / sqrt(2 x 56)), and at
# least as many questions, since noise depends on how long their explanations are.
_FEWEST_EXPLANATIONS = 64
_FEWEST_GROUPS = 4

_PHASE = "noise_floor"
_COUNTER = "reward_noise"

Group = Sequence[ScoredExplanation]


@dataclass(frozen=True)
class NoiseProbe:
    """Measures how much of a reward's differences is noise of the students' scores."""

    students: Mapping[str, Scorer]
    sections: Mapping[str, ModelConfig]  # of the students, by name
    reduction: StudentsConfig | None
    teacher: LogprobEngine
    scoring: ScoringConfig

    def measure(self, explanations: Sequence[ScoredExplanation], group_size: int, timer: PhaseTimer) -> float:
        """Standard deviation of a reward's error within groups. Collective.

        The larger of two: what other pack-mates change, and how far FP8 is from the same student in bfloat16, which is
        left out, with a line in the log, where the memory does not hold it.
        """
        count = max(_FEWEST_GROUPS, math.ceil(_FEWEST_EXPLANATIONS / group_size))
        chosen = explanations[: count * group_size]
        groups = [chosen[start : start + group_size] for start in range(0, len(chosen), group_size)]
        # Both readings have this noise, so their difference has the square root of two of it.
        of_mates = within_group_std(_errors(groups, self._beside_other_mates(chosen, timer))) / math.sqrt(2)
        found = {"other pack-mates": of_mates}
        if any(section.fp8 is not None for section in self.sections.values()):
            exact = self._in_bfloat16(chosen, timer)
            if exact is None:
                logger.warning("reward noise: bfloat16 students do not fit beside FP8 ones, so FP8's own is not in it")
            else:
                found["FP8 against bfloat16"] = within_group_std(_errors(groups, exact))
        noise = max(found.values())
        parts = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        logger.info("reward noise %.3g within groups (%s; %d explanations)", noise, parts, len(chosen))
        return noise

    def _beside_other_mates(self, chosen: Group, timer: PhaseTimer) -> Tensor:
        """`[n]` rewards from packs that hold only every other member of a group."""
        rewards = torch.empty(len(chosen), dtype=torch.float64)
        for half in (slice(0, None, 2), slice(1, None, 2)):
            by_student = {name: _read(student, name, chosen[half], timer) for name, student in self.students.items()}
            rewards[half] = self._combined(by_student)
        return rewards

    def _in_bfloat16(self, chosen: Group, timer: PhaseTimer) -> Tensor | None:
        """`[n]` rewards by the students without FP8, which are loaded one after another; None if one does not fit."""
        by_student = {}
        for name, student in self.students.items():
            if self.sections[name].fp8 is None:
                by_student[name] = tuple(one.rewards[name] for one in chosen)
                continue
            exact = self._load_bfloat16(name, student)
            if exact is None:
                return None
            by_student[name] = _read(exact, name, chosen, timer)
            del exact
            torch.cuda.empty_cache()  # the sampling engine may need the room outside of torch's cache
        return self._combined(by_student)

    def _load_bfloat16(self, name: str, student: Scorer) -> Scorer | None:
        model = student.engine.model
        layout, shape = model.layout, model.architecture
        free = free_device_bytes()
        needed = 2 * max_rank_parameters(shape, tp=layout.tp, pp=layout.pp)
        is_short = free is not None and free < needed
        if largest({"short": float(is_short)}, world())["short"]:  # all ranks load it, or none
            return None
        section = self.sections[name].model_copy(update={"fp8": None, "offload": False})
        engine = LogprobEngine(
            load_frozen_model(section, layout), temperature=student.engine.temperature, scoring=self.scoring
        )
        return build_scorer(self.teacher, engine, student.pairs, reward=student.reward, scoring=self.scoring)

    def _combined(self, by_student: Mapping[str, Sequence[Reward]]) -> Tensor:
        rows = zip(*by_student.values(), strict=True)
        combined = [combine_students(dict(zip(by_student, row, strict=True)), self.reduction).total for row in rows]
        return torch.tensor(combined, dtype=torch.float64)


class NoiseFloor:
    """The noise of a run's rewards: given, or measured in its first step and kept in its checkpoints."""

    def __init__(self, settings: TrainRewardConfig, probe: NoiseProbe) -> None:
        self._settings, self._probe = settings, probe
        self._noise = None if settings.noise_floor in (None, "auto") else float(settings.noise_floor)

    @property
    def _smallest_spread(self) -> float:
        assert self._noise is not None, "the noise is measured before it is used"
        return self._settings.noise_floor_factor * self._noise

    def smallest_spread(self, explanations: Sequence[ScoredExplanation], group_size: int, timer: PhaseTimer) -> float:
        """Standard deviation of rewards below which a group teaches nothing; 0 if none is set. Collective.

        The first call of a run measures the noise if it is not given.
        """
        if self._settings.noise_floor is None:
            return 0.0
        if self._noise is None:
            self._noise = self._probe.measure(explanations, group_size, timer)
            logger.info("groups whose rewards spread less than %.3g teach nothing", self._smallest_spread)
        return self._smallest_spread

    def is_below(self, rewards: Tensor) -> bool:
        """Whether the rewards `[G]` of a group, nan where dropped, differ too little to teach anything."""
        if self._settings.noise_floor is None:
            return False
        return is_within_noise(rewards, ~rewards.isnan(), smallest_spread=self._smallest_spread)

    def metrics(self, *, num_below: int) -> dict[str, float]:
        """Noise, floor and the number of a step's groups below it; nothing without a floor."""
        if self._settings.noise_floor is None:
            return {}
        assert self._noise is not None, "the noise is measured before it is used"
        return {
            "reward_noise": self._noise,
            "noise_floor": self._smallest_spread,
            "groups_below_noise_floor": float(num_below),
        }

    def counters(self) -> dict[str, float]:
        """What a checkpoint keeps: a resumed run has the floor that it began with, to the bit."""
        return {} if self._noise is None else {_COUNTER: self._noise}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """The inverse of `counters`; a run without a floor has none. Raises ValueError for what is no noise."""
        if _COUNTER in counters:
            noise = counters[_COUNTER]
            if not isinstance(noise, float) or not math.isfinite(noise) or noise < 0:
                raise ValueError(f"the checkpoint says {repr(noise)[:50]} for {_COUNTER}: take an intact one")
            self._noise = noise


def _read(student: Scorer, name: str, explanations: Group, timer: PhaseTimer) -> tuple[Reward, ...]:
    scores = student.read([one.students[name].pair for one in explanations], timer, phase_name=_PHASE)
    return student.rewards(scores, [one.old_logprobs for one in explanations])


def _errors(groups: Sequence[Group], again: Tensor) -> list[Tensor]:
    """What the second reading adds to each reward, `[G]` per group; explanations without a reward are left out."""
    first = torch.tensor([one.reward for group in groups for one in group], dtype=torch.float64)
    errors = torch.split(again - first, [len(group) for group in groups])
    return [error[~error.isnan()] for error in errors]
