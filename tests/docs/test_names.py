"""What the pages name exists: functions, files, configuration keys, columns."""

from __future__ import annotations

import re

import pytest
import yaml

from megatron_rlt.rewards.terms import LABELS
from megatron_rlt.store.explanation_row import explanation_schema
from tests.architecture.rooms import MAY_IMPORT
from tests.docs.names import fault_of, unknown_keys
from tests.docs.pages import PAGES, ROOT, blocks, code_words, page_names

_BESIDE_THE_DOCS = ("../README.md", "../CONTRIBUTING.md")


@pytest.mark.parametrize("page", [*page_names(), *_BESIDE_THE_DOCS])
def test_every_file_function_and_key_on_a_page_exists(page: str) -> None:
    faults = {word: fault for word in code_words(page) if (fault := fault_of(word)) is not None}
    assert faults == {}


def test_the_method_names_functions_for_every_step_of_the_loop() -> None:
    named = {word for word in code_words("method.md") if ".py:" in word}
    rooms = {word.split("/")[0] for word in named}
    assert {"prompts", "rollout", "scoring", "rewards", "algorithm", "policy"} <= rooms
    assert len(named) > 25


def test_every_difference_from_the_reference_names_a_test() -> None:
    rows = [line for line in (PAGES / "differences.md").read_text().splitlines() if line.startswith("| ")]
    claims = [row for row in rows if not row.startswith("| reference code |")]
    assert len(claims) > 12
    assert [row for row in claims if "tests/" not in row] == []


@pytest.mark.parametrize("page", page_names())
def test_yaml_has_keys_of_the_configuration(page: str) -> None:
    for block in blocks(page, "yaml"):
        assert unknown_keys(yaml.safe_load(block.text)) == [], str(block)


def test_the_completion_stores_columns_are_all_explained_and_no_others() -> None:
    table = (PAGES / "how-to" / "completions.md").read_text().partition("| column |")[2].partition("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    explained = [name.strip(" `") for cell in first_cells for name in cell.split(",")]
    assert sorted(explained) == sorted(explanation_schema(tuple(LABELS), None).names)


def test_the_table_of_rooms_has_one_row_per_room_and_no_other_page_has_one() -> None:
    table = (PAGES / "architecture.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    rooms = [line.split("|")[1].strip(" `") for line in table.splitlines()[2:]]
    assert sorted(rooms) == sorted(MAY_IMPORT)
    others = [PAGES / page for page in page_names() if page != "architecture.md"]
    assert [file for file in (*others, ROOT / "CONTRIBUTING.md") if "| room |" in file.read_text()] == []


@pytest.mark.parametrize("page", _BESIDE_THE_DOCS)
def test_every_relative_link_beside_the_docs_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (PAGES / page).read_text())
    relative = [link for link in links if not link.startswith("https://")]
    assert relative
    assert [link for link in relative if not (ROOT / link).exists()] == []


def test_the_readme_is_short_and_its_configurations_have_known_keys() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 900, "three minutes to read"
    configurations = re.findall(r"<<'YAML'\n(.*?)\nYAML\n", readme, re.DOTALL)
    assert len(configurations) == 2
    assert [unknown_keys(yaml.safe_load(text)) for text in configurations] == [[], []]


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("rewards/rlt.py:rlt_reward", None),
        ("prompts/student.py:StudentFormat.splice", None),
        ("rewards/rlt.py:rlt_rewards", "megatron_rlt/rewards/rlt.py has no rlt_rewards"),
        ("prompts/student.py:TeacherFormat.splice", "megatron_rlt/prompts/student.py has no TeacherFormat.splice"),
        ("rewards/reward.py", "no such file"),
        ("configs/none.yaml", "no such file or folder"),
        ("reward.lambda_kl", None),
        ("layout.tp", None),
        ("grpo.reference.beta: 0", None),
        ("reward.lambda", "no such configuration key"),
        ("metrics.jsonl", None),
        ("gpu", None),
    ],
)
def test_the_reader_tells_names_that_exist_from_others(word: str, fault: str | None) -> None:
    assert fault_of(word) == fault


def test_unknown_keys_are_found_in_yaml() -> None:
    assert unknown_keys({"grpo": {"group_size": 2, "gamma": 1}, "steps": 2}) == ["grpo.gamma", "steps"]
