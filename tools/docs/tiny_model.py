"""Write a tiny model with random weights, on which the tutorial's commands can be tried within minutes.

    python -m tools.docs.tiny_model models/tiny

An ordinary Hugging Face folder: Qwen2 architecture with 0.1 M parameters, and a tokenizer that spells any text byte by
byte, so that every tag set works. It knows nothing; only the commands can be tried on it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MAX_POSITIONS = 4096  # a prompt with the default system text has about 700 bytes
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tiny_model(folder: Path, *, seed: int) -> None:
    """Write model and tokenizer into `folder` (made if missing); the same seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _write_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.dtype = torch.float32
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def _write_tokenizer(folder: Path) -> int:
    """One token a byte and the special tokens; returns their number."""
    vocabulary = {sign: index for index, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=CHAT_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return core.get_vocab_size()


def main() -> None:
    """Parse arguments, write the model, say where it is."""
    parser = argparse.ArgumentParser(description="Write a tiny model with random weights, to try commands on.")
    parser.add_argument("folder", type=Path, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    arguments = parser.parse_args()
    write_tiny_model(arguments.folder, seed=arguments.seed)
    print(f"A model that knows nothing: {arguments.folder}")


if __name__ == "__main__":
    main()
