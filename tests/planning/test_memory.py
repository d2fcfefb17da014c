"""Memory by phase, by hand and against a GPU; `test_ledger.py` compares with ranks that really run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.config.plan import model_plan
from megatron_rlt.planning.memory import PhaseMemory, host_memory, peaks, phases_of_rank, weight_bytes
from megatron_rlt.planning.sampling import cache_bytes_per_token, cache_slots, vllm_claim_bytes, vllm_floor_bytes
from megatron_rlt.planning.work import Lengths, Pass, Work
from tests.docs.pages import ROOT
from tests.planning.plans import GPU, train_work
from tools.gpu.predicted import predicted_scoring, predicted_update
from tools.gpu.shapes import QWEN_7B, with_layers


def _by_name(work: Work) -> dict[str, PhaseMemory]:
    return {one.phase: one for one in peaks(work, GPU)}


def test_every_phase_holds_the_dry_runs_weights_gradients_and_optimizer(tmp_path: Path) -> None:
    work = train_work(tmp_path, "teacher.layout={tp: 2, pp: 2, sp: true}", "student.offload=true")
    teacher = model_plan("teacher", work.held[0].model, work.held[0].shape, 8, use="trained with reference")
    student = model_plan("student", work.held[1].model, work.held[1].shape, 8, use="frozen")
    last = {one.phase: one for one in phases_of_rank(work, GPU, 7)}
    assert list(last) == ["rollout", "student", "old_policy", "reference", "update", "save"]
    for name, one in last.items():
        onloaded = student.weight_bytes if name == "student" else 0
        assert (one.weights, one.gradients, one.optimizer) == (
            teacher.weight_bytes + onloaded,
            teacher.gradient_bytes,
            teacher.optimizer_bytes,
        )


def test_the_first_stage_is_the_fullest_in_an_update_with_many_packs(tmp_path: Path) -> None:
    work = train_work(tmp_path, "teacher.layout={pp: 4}", "grpo.max_tokens_per_pack=4000")
    assert _by_name(work)["update"].rank == 0, "four packs in flight outweigh the output layer"
    recomputed = train_work(
        tmp_path, "teacher.layout={pp: 4}", "teacher.recompute=full", "grpo.max_tokens_per_pack=4000"
    )
    assert _by_name(recomputed)["update"].activations < 0.3 * _by_name(work)["update"].activations


def test_sequence_and_context_parallelism_and_packs_lower_what_an_update_saves(tmp_path: Path) -> None:
    plain = _by_name(train_work(tmp_path, "teacher.layout={tp: 2}"))["update"].activations
    split = _by_name(train_work(tmp_path, "teacher.layout={tp: 2, sp: true}"))["update"].activations
    cut = _by_name(train_work(tmp_path, "teacher.layout={tp: 2, cp: 2}"))["update"].activations
    packs = _by_name(train_work(tmp_path, "teacher.layout={tp: 2}", "grpo.max_tokens_per_pack=8000"))["update"]
    # Per token and layer 4 x 3,584 elements between the products, of which half go, and 69,120 / 2 inside.
    assert split / plain == pytest.approx((2 * 3584 + 34_560) / (4 * 3584 + 34_560), abs=0.01)
    assert cut / plain == pytest.approx(0.5, abs=0.03)
    assert packs.activations / plain == pytest.approx(0.5, abs=0.03)


def test_fp8_and_offloaded_students(tmp_path: Path) -> None:
    bf16, fp8 = (train_work(tmp_path, *more, student="32b") for more in ((), ("student.fp8={}",)))
    sizes = [weight_bytes(work.model("student"), 0) / 1e9 for work in (bf16, fp8)]
    assert sizes == [pytest.approx(65.5, abs=0.05), pytest.approx(34.3, abs=0.05)], "docs/fp8.md"
    away = train_work(tmp_path, "student.fp8={}", "student.offload=true", student="32b")
    assert _by_name(away)["student"].weights == _by_name(fp8)["student"].weights
    assert _by_name(away)["update"].weights == _by_name(fp8)["update"].weights - 1e9 * sizes[1]
    assert host_memory(away, GPU).parts["student, offloaded"] == 8e9 * sizes[1]


def test_the_kv_cache_by_hand(tmp_path: Path) -> None:
    # Keys and values, 28 layers, 4 heads of 128, 2 bytes: 56 KiB a token, as published for this model.
    held = train_work(tmp_path, "teacher.layout={tp: 2, sp: true}").held[0]
    assert cache_bytes_per_token(held.shape, held.model.layout, "bfloat16") == 57_344 / 2
    # 1,000 + 512 slots first, doubled to 3,024, and then as many as a row may have.
    assert cache_slots(1000, 400, longest=4000) == 1512
    assert cache_slots(1000, 1500, longest=4000) == 3024
    assert cache_slots(1000, 3000, longest=4000) == 4000
    work = train_work(tmp_path, "teacher.layout={tp: 2, sp: true}", "rollout.max_batch_size=64")
    # 64 rows of 4,000, and two prompts (one group's, and the next) of 1,000 that wait.
    assert _by_name(work)["rollout"].caches == 57_344 / 2 * (64 * 4000 + 2 * 1000)


def test_vllm_claims_a_share_of_the_whole_card_and_sleeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vllm(**settings: object) -> Work:
        lines = [f"rollout.vllm.{key}={value}" for key, value in settings.items()]
        return train_work(tmp_path, "rollout.engine=vllm", *lines)

    monkeypatch.setattr("megatron_rlt.config.rollout._is_cpu_build", lambda: False)
    assert GPU.device is not None
    claim = 0.3 * GPU.device.memory_bytes
    asleep, awake = (_by_name(vllm(gpu_memory_share=0.3, sleep_level=level)) for level in (1, 0))
    assert asleep["rollout"].caches == asleep["sync"].caches == claim
    assert (asleep["update"].caches, awake["update"].caches) == (0, claim)
    assert host_memory(vllm(), GPU).parts["vLLM's weights, asleep"] == pytest.approx(8 * 15.2e9, rel=0.01)
    # Weights, and the cache of one completion of 4,000 tokens.
    assert vllm_floor_bytes(vllm()) == 2 * 7_615_616_512 + 4000 * 57_344
    server = vllm(placement="server", server="{transport: broadcast, bucket_bytes: 1000}")
    assert vllm_claim_bytes(server, GPU) == 0
    assert _by_name(server)["sync"].buffers == GPU.workspace_bytes + 2 * 3584 * 152_064 + 2000


def test_a_save_gathers_the_optimizer_in_host_memory(tmp_path: Path) -> None:
    work = train_work(tmp_path, "teacher.layout={tp: 2, sp: true}")
    shard, replicas = 3_807_910_400, 4  # docs/how-to/layouts.md
    assert host_memory(work, GPU).parts == {"a save: optimizer, gathered": 8 * 12 * (shard + shard / replicas)}


def test_host_memory_of_a_save_follows_its_keys(tmp_path: Path) -> None:
    """The teacher of 3.8 billion weights a rank on 4 replicas; policy and reference are saved in bfloat16."""
    own = 3_807_910_400 / 4

    def parts(*keys: str) -> tuple[dict[str, float], float]:
        work = train_work(tmp_path, "teacher.layout={tp: 2, sp: true}", *(f"checkpoint.{key}" for key in keys))
        return dict(host_memory(work, GPU).parts), _by_name(work)["save"].buffers - GPU.workspace_bytes

    copies = {"a save: copies that are being written": 8 * own * (12 + 2 * 2)}
    gathered = {"a save: optimizer, gathered": 8 * 12 * 5 * own}
    table = 4 * 3584 * 152_064 / 2  # float32 of the embedding's half, more than a bucket of 40 million weights
    assert parts("reshardable=tp_pp") == ({}, 0.0)
    assert parts("reshardable=tp_pp", "background=true") == (copies, 0.0)
    assert parts("background=true") == (gathered | copies, table)


def test_packs_by_hand() -> None:
    lengths = Lengths(max_prompt=100, max_completion=300, prompt=100, completion=100)
    one = Pass("update", "teacher", "update", num_sequences=64, max_tokens_per_pack=1000, max_sequences_per_pack=None)
    assert one.pack_tokens(lengths, dp=4) == 1000  # 16 sequences of up to 400
    assert one.num_packs(lengths, dp=4) == 4  # five of 200 fit
    assert one.pack_tokens(lengths, dp=64) == 400  # one sequence each
    long = Lengths(max_prompt=1000, max_completion=1000, prompt=1000, completion=1000)
    assert one.pack_tokens(long, dp=4) == 2000  # a longer one gets a pack of its own


def test_the_update_that_was_measured_on_an_h100() -> None:
    """`tools/gpu/training.py`: 4 layers, one sequence of 2,048 tokens per pack; no CUDA context in the measurement."""
    measured = json.loads((ROOT / "docs/results/gpu_training.json").read_text())["update in packs of 2048"][
        "peak_bytes"
    ]
    shape = with_layers(4, dry=False)
    assert shape.hidden_size == QWEN_7B.hidden_size
    predicted = predicted_update(shape, num_sequences=16, length=2048, pack_tokens=2048)
    assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("way", "fp8"),
    [
        ("bf16", None),
        ("blockwise", Fp8Config()),
        ("tensorwise", Fp8Config(recipe="tensorwise")),
        ("storage", Fp8Config(activations=False)),
    ],
)
def test_the_scoring_that_was_measured_on_an_h100(way: str, fp8: Fp8Config | None) -> None:
    """`tools/gpu/scoring.py`: 8 layers, packs of eight sequences of 2,048 tokens."""
    measured = json.loads((ROOT / "docs/results/gpu_scoring.json").read_text())[way]["peak_bytes"]
    predicted = predicted_scoring(with_layers(8, dry=False), fp8, num_sequences=8, length=2048, pack_tokens=16384)
    assert predicted == pytest.approx(measured, rel=0.015)
