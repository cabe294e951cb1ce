"""Tokens added to a tokenizer of others, and to the model beside it."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import yaml
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minimind.chat.tokenizer import CONTROL_TOKENS, ChatTokenizer
from minimind.model.checkpoint import load_model
from tests.broken import build, run, write_params

EXTEND = [*CONTROL_TOKENS, "<think>", "</think>", "苹果"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("extend") / "project")


def foreign(directory: Path, is_tied: bool) -> LlamaForCausalLM:
    """A model with a tokenizer that knows nothing of chats, as Llama 2's."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet)
    made.train_from_iterator(["user assistant 1 + 1 = ?"], trainer)
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    directory.mkdir(parents=True)
    made.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {}, "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "added_tokens.json").write_text("{}")
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    known = made.get_vocab_size() + 2  # rows that no token has
    stock = LlamaForCausalLM(
        LlamaConfig(vocab_size=known, tie_word_embeddings=is_tied, **sizes, **heads)
    )
    stock.save_pretrained(directory)
    return stock


def test_a_model_without_chat_tokens_learns_to_chat(workspace: Path, tmp_path: Path) -> None:
    for is_tied in (True, False):
        source = tmp_path / f"tied {is_tied}"
        stock = foreign(source, is_tied)
        _set(workspace, data={"tokenizer": str(source)}, tokenizer={"extend": EXTEND})
        outcome = run("tokenizer", workspace)
        assert outcome.exit_code == 0, outcome
        extended = workspace / "out/tokenizer"
        known = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab_size()
        tokenizer, model = ChatTokenizer.load(extended), load_model(extended)
        assert tokenizer.vocab_size == model.config.vocab_size == known + len(EXTEND)
        for ours, theirs in (
            (model.model.embed_tokens.weight, stock.model.embed_tokens.weight),
            (model.head, stock.lm_head.weight),
        ):
            assert torch.equal(ours[:known], theirs[:known])
            mean = theirs[:known].mean(0).expand(len(EXTEND), -1)
            torch.testing.assert_close(ours[known:], mean)
        loaded = AutoTokenizer.from_pretrained(extended)
        assert len(loaded) == tokenizer.vocab_size
        assert loaded.decode(
            loaded("<think>x苹果<|im_end|>").input_ids, skip_special_tokens=True
        ) == ("<think>x苹果")

        _set(workspace, encode={"tokenizer": str(extended)}, sft={"init": str(extended)})
        for command, options in (
            ("encode sft", ["--output", "out/chats"]),
            ("sft", ["--conversations", "out/chats"]),
        ):
            outcome = run(command, workspace, *options)
            assert outcome.exit_code == 0, outcome
        AutoModelForCausalLM.from_pretrained(workspace / "out/model")


def test_without_the_tokens_of_chats_a_tokenizer_is_refused(
    workspace: Path, tmp_path: Path
) -> None:
    foreign(tmp_path / "source", True)
    for extend in ([], EXTEND[1:]):
        _set(workspace, data={"tokenizer": str(tmp_path / "source")}, tokenizer={"extend": extend})
        outcome = run("tokenizer", workspace)
        assert outcome.exit_code == 1
        assert "source/tokenizer.json has no special token <|endoftext|>" in outcome.stderr
        assert "tokenizer.extend adds them" in outcome.stderr


def test_a_tokenizer_that_is_trained_here_is_extended(workspace: Path) -> None:
    _set(workspace, data={"tokenizer": "text.jsonl"}, tokenizer={"extend": ["<|fim|>", "<think>"]})
    outcome = run("tokenizer", workspace)
    assert outcome.exit_code == 0, outcome
    tokenizer = ChatTokenizer.load(workspace / "out/tokenizer")
    assert len(tokenizer.encode_text("<|fim|>")) == 1
    assert not (workspace / "out/tokenizer/config.json").exists()
    _set(workspace, tokenizer={"extend": [""]})
    assert "tokenizer.extend.0" in run("tokenizer", workspace).stderr


def _set(workspace: Path, **sections: dict[str, object]) -> None:
    params = yaml.safe_load((workspace / "params.yaml").read_text(encoding="utf-8"))
    for section, values in sections.items():
        params[section] |= values
    write_params(workspace, params)
