"""Real tokenizers small enough for tests: byte-level BPE trained on a few sentences, saved as a Hugging Face folder.

`qwen` looks like Qwen2.5 (<|im_start|>, <|im_end|>, no begin-of-text token), `llama` like Llama 3 (a begin-of-text
token, which both the chat template and the post-processor add). Any text can be written; like their models, words
are cut so that a run of punctuation takes the newlines after it: a token may reach across the edge of a tag.
The same call always gives the same ids.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Style = Literal["qwen", "llama"]

BPE_VOCAB_SIZE = 392  # 256 bytes and 136 merges; special tokens come on top, 400 at most

WORD = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
NEWLINES_APART = Regex(
    r"[\r\n]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\r\n]+"
)  # a word of another kind

SENTENCES = (
    "The question asks for the sum of three and four, so the answer is seven.",
    "First we add the numbers, then we multiply the result by two.",
    "Let us check the solution step by step: 3 + 4 = 7, and 7 * 2 = 14.",
    "Therefore the final answer is 14.\n\nThe thought is complete and the solution follows.",
    "You are a teacher who explains the solution to a student in clear and simple steps.",
    "Now it ends.<|end_of_thought|> Then it ends.<|end_of_explanation|> Here too.<|end_of_thought|>",
    "<|begin_of_thought|>\n\nbegin of thought<|end_of_thought|>\n\n<|begin_of_solution|>solution<|end_of_solution|>",
)

OTHER_SENTENCES = (
    "Whoever writes about weather uses other words: wind, rain, clouds, thunder and frost.",
    "Yesterday it was raining; tomorrow the wind will be blowing from the north-west.",
)  # another tokenizer is trained on these

SPECIAL_TOKENS: dict[Style, tuple[str, ...]] = {
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}

CHAT_TEMPLATES: dict[Style, str] = {
    "qwen": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + (message['content'] | trim) }}"
        "{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}


def tiny_tokenizer(
    folder: Path, style: Style = "qwen", sentences: Sequence[str] = SENTENCES, *, word: Regex = WORD
) -> Path:
    """Save a tokenizer of fewer than 400 ids into `folder` (made if missing) and return the folder."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(word, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCAB_SIZE, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    core.train_from_iterator(sentences, trainer)
    core.add_special_tokens(list(SPECIAL_TOKENS[style]))
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if style == "llama":
        named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
        begin = "<|begin_of_text|>"
        core.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, core.token_to_id(begin))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT_TEMPLATES[style], **named)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return folder
