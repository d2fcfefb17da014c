"""Both tokenizer styles under both tag sets, built once a session."""

from pathlib import Path

import pytest

from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.prompts.pairs import PairBuilder, pair_builder
from megatron_rlt.prompts.tokenizer import ChatTokenizer, load_tokenizer
from tests.tiny_tokenizers import NEWLINES_APART, Style, tiny_tokenizer

STYLES: tuple[Style, ...] = ("qwen", "llama")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Style, Path]:
    return {style: tiny_tokenizer(tmp_path_factory.mktemp(style), style) for style in STYLES}


@pytest.fixture(scope="session", params=STYLES)
def tokenizer(request: pytest.FixtureRequest, folders: dict[Style, Path]) -> ChatTokenizer:
    return load_tokenizer(folders[request.param])


@pytest.fixture(scope="session", params=[(style, tags) for style in STYLES for tags in ("stratos", "r1")], ids="-".join)
def pairs(request: pytest.FixtureRequest, folders: dict[Style, Path]) -> PairBuilder:
    style, tags = request.param
    return pair_builder(folders[style], folders[style], PromptConfig(tags=tags))


@pytest.fixture(scope="session")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that never joins newlines with signs, as Gemma's."""
    return tiny_tokenizer(tmp_path_factory.mktemp("apart"), "qwen", word=NEWLINES_APART)
