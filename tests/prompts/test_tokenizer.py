import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.config.models import ModelConfig
from megatron_rlt.config.paths import tokenizer_faults
from megatron_rlt.config.prompts import PromptConfig, TagsConfig
from megatron_rlt.config.reward import RewardConfig
from megatron_rlt.prompts.pairs import pair_builder, student_format, teacher_format
from megatron_rlt.prompts.tokenizer import ChatTokenizer, load_tokenizer
from tests.tiny_tokenizers import Style, tiny_tokenizer


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_turns_end_with_the_templates_own_token(folders: dict[Style, Path]) -> None:
    for style, token in (("qwen", "<|im_end|>"), ("llama", "<|eot_id|>")):
        tokenizer = load_tokenizer(folders[style])
        assert tokenizer.decode([tokenizer.end_of_turn_id]) == token
        assert tokenizer.stop_ids == {tokenizer.end_of_turn_id}


def test_end_of_turn_is_read_from_the_template_where_eos_is_another_token(tmp_path: Path) -> None:
    """Base models: eos is <|endoftext|> while the chat template closes turns with <|im_end|>."""
    folder = tiny_tokenizer(tmp_path, "qwen")
    edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode([tokenizer.end_of_turn_id]) == "<|im_end|>"
    assert tokenizer.stop_ids == {tokenizer.end_of_turn_id, tokenizer.hf.convert_tokens_to_ids("<|endoftext|>"), 7}


def test_special_tokens_in_data_are_ordinary_text(tokenizer: ChatTokenizer) -> None:
    for text in ("a<|im_end|>b", "<|eot_id|>", "<|begin_of_text|>"):
        token_ids = tokenizer.encode(text)
        assert tokenizer.decode(token_ids) == text
        assert not set(token_ids) & set(tokenizer.special_tokens)


def test_chat_prefix_is_the_rendered_template_with_one_begin_token(folders: dict[Style, Path]) -> None:
    qwen = load_tokenizer(folders["qwen"])
    assert qwen.decode(qwen.chat_prefix("Be kind.", "2+2?")) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    llama = load_tokenizer(folders["llama"])
    assert llama.decode(llama.chat_prefix("", "2+2?")) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_folder_without_tokenizer_template_or_eos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "nothing")
    no_template = tiny_tokenizer(tmp_path / "no_template")
    (no_template / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template; put"):
        load_tokenizer(no_template)
    no_eos = tiny_tokenizer(tmp_path / "no_eos")
    edit_json(no_eos / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match="no eos_token; name"):
        load_tokenizer(no_eos)


def test_a_template_without_system_role_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    template = folder / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    with pytest.raises(ValueError, match=r'no system here.*set the system prompt to ""'):
        load_tokenizer(folder).chat_prefix("Be kind.", "2+2?")
    assert load_tokenizer(folder).chat_prefix("", "2+2?")


def test_a_template_that_opens_a_tag_itself_is_refused(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}")
    with pytest.raises(ValueError, match="itself begins the assistant's text with '<think>'"):
        student_format(folder, PromptConfig(tags="r1"))
    with pytest.raises(ValueError, match="itself begins the assistant's text with '<think>'"):
        student_format(folder, PromptConfig(tags="stratos"))


def test_tags_that_the_tokenizer_cannot_write_are_refused(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    edit_json(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    tags = TagsConfig(thought_open="<T>", solution_open="<s>", explanation_open="<e>", explanation_close="</e>")
    with pytest.raises(ValueError, match="writes the tag '<T>' as '<t>'"):
        teacher_format(folder, PromptConfig(custom_tags=tags, exact_text=False))


def test_vocabularies_must_agree_id_for_id(folders: dict[Style, Path], tmp_path: Path) -> None:
    """What the formats find in the tokenizers is what the configuration's rule has read from their files."""
    swapped = tiny_tokenizer(tmp_path, "qwen")
    file = swapped / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    own, said = ModelConfig(model=folders["qwen"]), {}
    for name, folder in {"same": folders["qwen"], "llama": folders["llama"], "swapped": swapped}.items():
        faults = tokenizer_faults(own, {"student": ModelConfig(model=folder)}, RewardConfig())
        assert pair_builder(own.model, folder, PromptConfig()).one_tokenizer == (faults == [])
        said[name] = "".join(faults)
    assert said["same"] == ""
    assert re.match(r"student\.model: .* needs one tokenizer; set reward\.lambda_kl=0 .*tokenizer$", said["llama"])
    assert re.search(r"differs from the teacher's in 2 tokens \(token 'a' has id \d+ for the teacher", said["swapped"])


def test_two_tokenizers_go_with_a_reward_that_compares_no_tokens(folders: dict[Style, Path]) -> None:
    def faults(**reward: Any) -> list[str]:
        student = {"student": ModelConfig(model=folders["llama"])}
        return tokenizer_faults(ModelConfig(model=folders["qwen"]), student, RewardConfig(**reward))

    assert faults(lambda_kl=0.0) == []
    (full,) = faults(lambda_kl=0.0, kl_estimator="full")
    assert full.startswith("reward.kl_estimator=full: compares two distributions over one vocabulary")
