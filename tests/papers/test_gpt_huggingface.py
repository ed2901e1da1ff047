"""GPT and transformers' GPT: each takes the other's weights, and computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from paperscale.errors import UserError
from paperscale.jobs.exporting import _renamed
from paperscale.nn.exchange import Part
from paperscale.papers.gpt import Gpt1, Gpt2, GptLanguageModel
from paperscale.training.consolidate import write_file
from paperscale.training.initial import match, matched, read_initial
from paperscale.training.weights import joined, of_model, open_weights, taken

transformers = pytest.importorskip("transformers", reason="transformers is not there; `make setup` installs it")

SIZE: dict[str, Any] = {"vocab_size": 77, "layers": 3, "hidden": 48, "heads": 4, "positions": 20}
BOTH = pytest.mark.parametrize(
    ("kind", "theirs"), [(Gpt1, "OpenAIGPTLMHeadModel"), (Gpt2, "GPT2LMHeadModel")], ids=["gpt1", "gpt2"]
)


def drawn(module: nn.Module) -> Any:
    """Draw every parameter, so that none is the same as another, or zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return module.eval()


def exported(module: GptLanguageModel, folder: Path) -> Path:
    folder.mkdir()
    foreign = _renamed(of_model(module, "the test"), module.export_names("huggingface"), "GptLanguageModel")
    write_file(foreign, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(module.export_config("huggingface")))
    return folder


def compare(module: GptLanguageModel, other: Any) -> None:
    tokens = torch.randint(SIZE["vocab_size"], (3, SIZE["positions"]))
    with torch.no_grad():
        ours, theirs = module.network.logits({"tokens": tokens}), other.eval()(tokens).logits.flatten(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@BOTH
def test_transformers_loads_what_is_exported_and_computes_the_same(kind, theirs, tmp_path):
    module = drawn(GptLanguageModel(kind(**SIZE)))
    folder = exported(module, tmp_path / "out")
    other, info = getattr(transformers, theirs).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    compare(module, other)
    config = other.config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (3, 48, 4, 20)


@BOTH
def test_weights_of_transformers_are_read_with_and_without_the_head(kind, theirs, tmp_path):
    made = GptLanguageModel(kind(**SIZE)).export_config("huggingface")
    config = {"gpt2": transformers.GPT2Config, "openai-gpt": transformers.OpenAIGPTConfig}[made["model_type"]](**made)
    other = drawn(getattr(transformers, theirs)(config))
    for name, part in (("head", other), ("body", other.transformer)):
        part.save_pretrained(tmp_path / name)
        module = GptLanguageModel(kind(**SIZE)).eval()
        fits = read_initial(module, tmp_path / name, None)
        assert fits.is_whole
        assert fits.library == "huggingface"
        compare(module, other)
    with pytest.raises(UserError, match=r"16 missing \(network.blocks.3.attention_norm.weight\): .*another network"):
        matched(GptLanguageModel(kind(**{**SIZE, "layers": 4})), tmp_path / "head", None)
    with pytest.raises(UserError, match=r"n_head is 4, the model's is 6; make model.network the same"):
        matched(GptLanguageModel(kind(**{**SIZE, "heads": 6})), tmp_path / "head", None)


def test_masks_of_old_files_are_left_out_and_a_prefix_is_found(tmp_path):
    module = drawn(GptLanguageModel(Gpt2(**SIZE)))
    state = load_file(exported(module, tmp_path / "out") / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    save_file({**old, "h.0.attn.bias": torch.ones(1, 1, 20, 20)}, tmp_path / "old.safetensors")
    other = GptLanguageModel(Gpt2(**SIZE))
    fits = read_initial(other, tmp_path / "old.safetensors", None)
    assert fits.unexpected == ["h.0.attn.bias"]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    save_file({f"model.{name}": tensor for name, tensor in state.items()}, tmp_path / "wrapped.safetensors")
    with pytest.raises(UserError, match=r"add init_prefix=model./$"):
        match(GptLanguageModel(Gpt2(**SIZE)), open_weights(tmp_path / "wrapped.safetensors"))


@pytest.mark.parametrize("transposed", [False, True])
def test_any_elements_of_a_part_are_those_of_the_whole(transposed):
    parts = [torch.randn(4, 5) for _ in range(3)]
    weights = list(of_model(nn.ParameterList(parts), "the test").tensors.values())
    whole = joined(weights, transposed)
    expected = torch.cat(parts).T if transposed else torch.cat(parts)
    assert whole.shape == tuple(expected.shape) == Part("x", 0, 3, transposed).whole((4, 5))
    assert torch.equal(whole.read(7, 31), expected.reshape(-1)[7:31])
    for number, part in enumerate(parts):
        back = taken(whole, Part("x", number, 3, transposed))
        assert back.shape == (4, 5)
        assert torch.equal(back.read(3, 17), part.reshape(-1)[3:17])
    assert taken(whole, Part("x", 0, 7, transposed)) is whole, "which then has another shape than the model's"


def test_a_tensor_of_which_a_part_is_not_named_is_refused():
    weights = of_model(nn.ParameterDict({name: torch.ones(2, 2) for name in "qkv"}), "the test")
    names: dict[str, str | Part] = {"q": Part("fused", 0, 3), "v": Part("fused", 2, 3)}
    with pytest.raises(UserError, match=r"of 'fused' not all parts are there; name a tensor for each"):
        _renamed(weights, names, "Model")
