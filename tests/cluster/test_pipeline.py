"""Pipelines without a cluster: what is refused, what is done, and that the shipped ones name what exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlt.cluster.pipeline import load_stages, submit

ROOT = Path(__file__).parents[2]


def _file(folder: Path, text: str) -> Path:
    file = folder / "chain.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("{script: sft, config: none.yaml}", r"stages.a.config: none.yaml is no file"),
        ("{script: sft, config: x.yaml, shares: 2}", r"stages.a.shares=2: only collect has shares"),
        ("{script: sft, config: x.yaml, each: [seed=1]}", r"stages.a.each: only evaluate takes several"),
        ("{script: sft, config: x.yaml, at_once: 2}", r"stages.a.at_once=2: has no effect on a single job"),
        ("{script: sft, config: x.yaml, after: [b]}", r"stages.a.after: b does not stand before this stage"),
        ("{script: sft, config: x.yaml, node: 2}", r"node"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, fault: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("output_dir: run\nmodel: {model: m}\ndata: {path: d}\n")
    with pytest.raises(ValueError, match=fault):
        load_stages(_file(tmp_path, f"stages:\n  a: {stage}\n"), [])


def test_a_stage_whose_result_is_there_is_done_and_the_next_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    keys = f"keys: [output_dir={tmp_path}/warm]"
    file = _file(
        tmp_path,
        f"stages:\n  warm: {{script: sft, config: configs/demo/warmup_2cpu_dp2.yaml, {keys}}}\n"
        "  rl: {script: train_rlt, config: configs/demo/rlt_2cpu_tp2sp_dp2.yaml, nodes: 4}\n",
    )
    before = list(submit(load_stages(file, []), dry_run=True))
    assert "--dependency=afterok:JOB_OF_warm" in before[1]
    assert "--nodes=4" in before[1]
    (tmp_path / "warm" / "hf").mkdir(parents=True)
    after = list(submit(load_stages(file, ["stages.rl.nodes=8"]), dry_run=True))
    assert after[0] == "warm: done"
    assert "--dependency" not in after[1]
    assert "--nodes=8" in after[1]


def test_a_stage_is_done_when_every_kind_that_it_exports_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    keys = f"output_dir={tmp_path}/warm, 'checkpoint.export=[nemo, bridge]'"
    warm = f"stages:\n  warm: {{script: sft, config: configs/demo/warmup_2cpu_dp2.yaml, keys: [{keys}]}}\n"
    for kind in ("nemo", "bridge"):
        assert not load_stages(_file(tmp_path, warm), [])[0].is_done
        (tmp_path / "warm" / kind).mkdir(parents=True)
    assert load_stages(_file(tmp_path, warm), [])[0].is_done
    with pytest.raises(ValueError, match=r"^stages.warm: its checkpoint.export=\[\] leaves no model [^\n]*$"):
        load_stages(_file(tmp_path, warm.replace("[nemo, bridge]", "[]")), [])


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "pipelines").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("nodes", [1, 4, 8])
def test_the_shipped_pipelines_load(file: Path, nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = list(submit(load_stages(file, [f"stages.rl.nodes={nodes}"]), dry_run=True))
    assert len(lines) == 5
    assert f"--nodes={nodes}" in lines[1]
