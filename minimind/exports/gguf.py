"""A checkpoint as one GGUF file, for llama.cpp and Ollama, by the `gguf` package.

Names of tensors are that package's; what else llama.cpp wants of each architecture stands here.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from minimind.chat.tokenizer import END, PAD, START, TEMPLATE_FILE
from minimind.errors import UserError
from minimind.exports.receipt import RECEIPT, GgufType, ggufs_of, require_whole, sha256_of
from minimind.files import replacing
from minimind.lineage.verify import Finding
from minimind.model.checkpoint import load_model

try:
    import gguf
except ImportError:
    raise UserError("GGUF needs the package gguf: pip install 'minimind-dvc[gguf]'.") from None

# Keys in a file's metadata, and of what a SHA-256 stands there.
OF_RECEIPT, OF_TENSORS = "minimind.receipt.sha256", "minimind.tensors.sha256"
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "ernie4_5_moe": gguf.MODEL_ARCH.ERNIE4_5_MOE,
}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT = {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False}
# How text is divided before pieces are merged, and llama.cpp's name of that.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [_DIGITS, _BYTES],  # of tokenizers that are trained here
    "gpt-2": [_BYTES],  # MiniMind's
    "qwen2": [_SPLIT, _BYTES | {"use_regex": False}],
}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


def write_gguf(folder: Path, output: Path, kind: GgufType) -> None:
    """Write a checkpoint's or exported folder's model, tokenizer and chat template as one file.

    Matrices are of `kind`, what is small stays float32. The file appears whole or not at all.

    Raises:
        UserError: the folder is not what its receipt says, or llama.cpp has no such model.
    """
    if (folder / RECEIPT).exists():
        require_whole(folder)
    config = folder / "config.json"
    if config.is_file() and "SequenceClassification" in config.read_text("utf-8", "replace"):
        raise UserError(f"{folder} is a reward model: it writes no text; name a chat model.")
    load_model(folder)  # says what is wrong with a checkpoint
    source = _Source(folder)
    with replacing(output) as partial:
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[source.arch])
        digest = hashlib.sha256()
        for name, values in sorted(source.tensors()):
            data, tensor_type = _stored(name, values, kind)
            digest.update(f"{name} {tensor_type.name} {values.shape}\n".encode())
            digest.update(data.tobytes())
            writer.add_tensor(name, data, raw_dtype=tensor_type)
        writer.add_name(folder.resolve().name)
        writer.add_file_type(_FILE_TYPES[kind])
        writer.add_string(OF_TENSORS, digest.hexdigest())
        if (folder / RECEIPT).exists():
            writer.add_string(OF_RECEIPT, sha256_of(folder / RECEIPT))
        source.describe_model(writer)
        source.describe_tokenizer(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def check_ggufs(folder: Path) -> Iterator[Finding]:
    """Whether the GGUF files of an exported folder are of its receipt, their tensors as made."""
    receipt = sha256_of(folder / RECEIPT)
    for file in ggufs_of(folder):
        try:
            reader = gguf.GGUFReader(file)
            said = {
                key: field.contents()
                for key in (OF_RECEIPT, OF_TENSORS)
                if (field := reader.get_field(key))
            }
            digest = hashlib.sha256()
            for tensor in reader.tensors:
                shape = tuple(int(length) for length in reversed(tensor.shape))
                digest.update(f"{tensor.name} {tensor.tensor_type.name} {shape}\n".encode())
                digest.update(tensor.data.tobytes())
        except Exception as error:  # the reader raises whatever its parts raise
            yield Finding(file.name, f"it cannot be read: {error!r}", "broken")
            continue
        if said.get(OF_RECEIPT) != receipt:
            yield Finding(file.name, "it was made from a folder with another receipt", "broken")
        elif said.get(OF_TENSORS) != digest.hexdigest():
            yield Finding(file.name, "its tensors are others than it says", "broken")
        else:
            yield Finding(
                file.name, "made from this folder, with the tensors that it says", "whole"
            )


class _Source:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        if (model_type := self.config["model_type"]) not in ARCHITECTURES:
            raise UserError(
                f"{folder / 'config.json'}: model_type is {model_type!r}; for GGUF there are "
                f"{', '.join(ARCHITECTURES)}."
            )
        self.arch = ARCHITECTURES[model_type]

    @cached_property
    def head_size(self) -> int:
        own = self.config.get("head_dim")
        return own or self.config["hidden_size"] // self.config["num_attention_heads"]

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """By their names in GGUF, in float32."""
        names = gguf.get_tensor_name_map(self.arch, self.config["num_hidden_layers"])
        experts: dict[str, dict[int, np.ndarray]] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                values = tensor.float().numpy()
                if name == "lm_head.weight" and self.config["tie_word_embeddings"]:
                    continue
                if match := _EXPERT.fullmatch(name):
                    of_layer = experts.setdefault(f"{match[1]}.{match[3]}", {})
                    of_layer[int(match[2])] = values
                else:
                    if "moe_statics" in name:
                        name, values = name.replace("_bias", ".bias"), values[0]
                    yield self._named(name, values, names)
        for name, of_layer in experts.items():
            yield self._named(name, np.stack([of_layer[i] for i in range(len(of_layer))]), names)

    def _named(self, name: str, values: np.ndarray, names: Any) -> tuple[str, np.ndarray]:
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise UserError(f"{self.folder}: llama.cpp has nothing for the weight {name}.")
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        part = name.split(".")[-2]
        if self.arch == gguf.MODEL_ARCH.LLAMA and part in heads:
            # Rotated pairs stand side by side there; Hugging Face has them half a head apart.
            halves = values.reshape(self.config[heads[part]], 2, self.head_size // 2, -1)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        return known, values

    def describe_model(self, writer: Any) -> None:
        config, rope = self.config, self.config.get("rope_parameters") or {}
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta")))
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
        if rope.get("rope_type") == "yarn":
            usual = 0.1 * math.log(rope["factor"]) + 1  # which llama.cpp multiplies by itself
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_attn_factors((rope.get("attention_factor") or usual) / usual)
            writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
            writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
        if self.arch == gguf.MODEL_ARCH.QWEN3MOE:
            writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
            writer.add_expert_used_count(config["num_experts_per_tok"])
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        elif self.arch == gguf.MODEL_ARCH.ERNIE4_5_MOE:
            writer.add_expert_count(config["moe_num_experts"])
            writer.add_expert_used_count(config["moe_k"])
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
            writer.add_expert_shared_count(config["moe_num_shared_experts"])
            writer.add_expert_shared_feed_forward_length(
                config["moe_intermediate_size"] * config["moe_num_shared_experts"]
            )
            writer.add_interleave_moe_layer_step(1)
            writer.add_leading_dense_block_count(0)

    def describe_tokenizer(self, writer: Any) -> None:
        model, added = self.tokenizer["model"], self.tokenizer["added_tokens"]
        tokens = [f"[unused{number}]" for number in range(self.config["vocab_size"])]
        types = [gguf.TokenType.UNUSED] * len(tokens)
        for token, number in model["vocab"].items():
            tokens[number], types[number] = token, gguf.TokenType.NORMAL
        for token in added:
            kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
            tokens[token["id"]], types[token["id"]] = token["content"], kind
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        ids = {token: number for number, token in enumerate(tokens)}
        writer.add_tokenizer_model("gpt2")  # BPE of bytes
        writer.add_tokenizer_pre(self._pre_tokenizer())
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(ids[START])
        writer.add_eos_token_id(ids[END])
        writer.add_pad_token_id(ids[PAD])
        writer.add_add_bos_token(False)  # the chat template begins with one
        writer.add_chat_template((self.folder / TEMPLATE_FILE).read_text(encoding="utf-8"))

    def _pre_tokenizer(self) -> str:
        """llama.cpp's name of what divides text; another would give other tokens."""
        said = self.tokenizer["pre_tokenizer"] or {}
        parts = [
            {key: value for key, value in part.items() if key != "trim_offsets"}
            for part in said.get("pretokenizers", [said])
        ]
        for name, known in PRE_TOKENIZERS.items():
            if parts == known and self.tokenizer["model"]["type"] == "BPE":
                return name
        raise UserError(
            f"{self.folder / 'tokenizer.json'}: its pre_tokenizer is none of those that have a "
            f"name in llama.cpp and are known here: {', '.join(PRE_TOKENIZERS)}."
        )


def _stored(name: str, values: np.ndarray, kind: GgufType) -> tuple[np.ndarray, Any]:
    """A tensor's values as they are stored, and their type."""
    types = gguf.GGMLQuantizationType
    # Vectors and the router are small, and llama.cpp adds to them in float32.
    if values.ndim < 2 or "ffn_gate_inp" in name or "exp_probs" in name:
        stored = types.F32
    elif kind == "q8_0" and values.shape[-1] % 32:  # its blocks have 32 values
        stored = types.F16
    else:
        stored = types[kind.upper()]
    return gguf.quants.quantize(np.ascontiguousarray(values), stored), stored
