"""BERT and transformers' BERT: each takes the other's weights, and computes the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from paperscale.cli import main
from paperscale.data.packing import pack
from paperscale.data.tokenizer import FILE, train
from paperscale.data.tokens import Document, write_tokens
from paperscale.data.writer import ShardWriter
from paperscale.errors import UserError
from paperscale.nn.attention import Layout
from paperscale.papers.bert import Bert, BertClassifier, BertPretraining
from paperscale.training.initial import match, matched, read_initial
from paperscale.training.weights import open_weights
from test_export import save

transformers = pytest.importorskip("transformers", reason="transformers is not there; `make setup` installs it")

LENGTHS = (11, 4, 24, 2, 17)
SIZE = {"layers": 2, "hidden": 32, "heads": 4, "positions": 24}
TEXTS = ["the cat sat on the mat", "a naïve cat, and a dog that sat down", "on the mat sat the dog"] * 9


def network(**options: Any) -> Bert:
    return Bert(vocab_size=300, **{**SIZE, **options})


def drawn(module: nn.Module) -> Any:
    """Draw every parameter, so that none is the same as another, or zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return module.eval()


def theirs(kind: str, **options: Any) -> Any:
    """One of transformers' models with random weights."""
    config = {**network().huggingface_config(), **options}
    return drawn(getattr(transformers, kind)(transformers.BertConfig(**config)))


def ragged() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same sequences, packed for us and padded for transformers."""
    tokens = [torch.randint(300, (length,)) for length in LENGTHS]
    segments = [(torch.arange(length) > length // 2).long() for length in LENGTHS]
    pad: Any = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(length, dtype=torch.int64) for length in LENGTHS], batch_first=True)
    padded = {"input_ids": pad(tokens, batch_first=True), "token_type_ids": pad(segments, batch_first=True)}
    return pack([t.numpy() for t in tokens], [s.numpy() for s in segments]), {**padded, "attention_mask": mask}


def compare(ours: Any, other: Any) -> None:
    """The logits of every token, and of the pairs where there are any."""
    packed, padded = ragged()
    with torch.no_grad():
        tokens_TV, pairs_N2 = ours.network.logits(packed)
        found = other(**padded)
    logits_NLV = found.prediction_logits if pairs_N2 is not None else found.logits
    torch.testing.assert_close(tokens_TV, logits_NLV[padded["attention_mask"].bool()], rtol=1e-5, atol=1e-5)
    if pairs_N2 is not None:
        torch.testing.assert_close(pairs_N2, found.seq_relationship_logits, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents with sentences, and their tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = train("wordpiece", TEXTS, 300)
    with ShardWriter(folder, "text", num_processes=0) as writer:
        writer.attach(FILE, tokenizer.to_json().encode())
        write_tokens(writer, "train", TEXTS, lambda text: Document(tokenizer.encode([text])), 300)
    return folder


def checkpoint_of(module: BertPretraining, folder: Path, shards: Path) -> Path:
    bert = module.network.bert
    options = {**SIZE, "vocab_size": 300, "causal": bert.causal}
    model = {
        "class_path": "paperscale.papers.bert.BertPretraining",
        "init_args": {
            "network": {"class_path": "paperscale.papers.bert.Bert", "init_args": options},
            "pairs": module.network.pair is not None,
        },
    }
    data = {"class_path": "paperscale.data.SegmentPairs", "init_args": {"path": str(shards), "global_batch_size": 8}}
    return save(module, folder / "new-1", 2, yaml.safe_dump({"model": model, "data": data}))


def exported(module: BertPretraining, folder: Path, shards: Path) -> Path:
    words = ["checkpoint", "export", str(checkpoint_of(module, folder, shards)), "--format", "huggingface"]
    assert main([*words, "-o", str(folder / "hf")]) == 0
    return folder / "hf"


def loaded(kind: str, folder: Path) -> Any:
    """Load with transformers, as anyone would; every name must be there, and no other."""
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.architectures == [kind]
    return model.eval()


def test_a_run_becomes_a_folder_that_transformers_loads_with_its_tokenizer(shards, tmp_path, capsys):
    module = drawn(BertPretraining(network()))
    folder = exported(module, tmp_path, shards)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "tokenizer" not in capsys.readouterr().out
    compare(module, loaded("BertForPreTraining", folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = tokenizer("The naïve cat", "sat [MASK]")
    assert tokenizer.convert_ids_to_tokens(found.input_ids)[-3:] == ["sat", "[MASK]", "[SEP]"]
    assert found.input_ids[0] == tokenizer.cls_token_id
    assert tokenizer.decode(found.input_ids, skip_special_tokens=True) == "the naive cat sat"
    assert found.token_type_ids[-4:] == [0, 1, 1, 1]
    assert (tokenizer.model_max_length, tokenizer.pad_token_id, len(tokenizer)) == (24, 0, tokenizer.vocab_size)


def test_where_the_set_is_gone_the_tokenizer_is_left_out_with_a_word(shards, tmp_path, capsys):
    gone = shutil.copytree(shards, tmp_path / "gone")
    module = drawn(BertPretraining(network()))
    checkpoint_of(module, tmp_path, gone)
    shutil.rmtree(gone)
    words = ["checkpoint", "export", str(tmp_path / "step-1"), "--format", "huggingface", "-o", str(tmp_path / "hf")]
    assert main(words) == 0
    assert f"without its tokenizer: no shards at {gone}" in capsys.readouterr().out
    loaded("BertForPreTraining", tmp_path / "hf")


@pytest.mark.parametrize(("causal", "kind"), [(False, "BertForMaskedLM"), (True, "BertLMHeadModel")])
def test_without_pairs_it_is_a_masked_or_a_causal_language_model_there(shards, tmp_path, causal, kind):
    module = drawn(BertPretraining(network(causal=causal), pairs=False))
    folder = exported(module, tmp_path, shards)
    compare(module, loaded(kind, folder))


def test_a_pooler_of_the_last_token_is_refused(shards, tmp_path, capsys):
    checkpoint = checkpoint_of(BertPretraining(network(causal=True)), tmp_path, shards)
    assert main(["checkpoint", "export", str(checkpoint), "--format", "huggingface", "-o", str(tmp_path / "hf")]) == 2
    assert "transformers' BERT pools the first token" in capsys.readouterr().err


def test_weights_of_bert_for_pre_training_are_taken_from_the_folder_and_from_the_file(tmp_path):
    other = theirs("BertForPreTraining")
    other.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        ours = BertPretraining(network()).eval()
        fits = read_initial(ours, source, None)
        assert fits.is_whole
        assert str(fits).endswith("named as huggingface names them")
        compare(ours, other)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("BertModel", {"transform", "norm", "places", "pair"}),
        ("BertForMaskedLM", {"pooler", "pair"}),
    ],
)
def test_weights_without_our_heads_are_taken_and_the_heads_drawn(tmp_path, kind, missing):
    other = theirs(kind)
    other.save_pretrained(tmp_path)
    ours = BertPretraining(network()).eval()
    fits = read_initial(ours, tmp_path, None)
    assert {name.split(".")[1] for name in fits.missing} == missing
    assert not fits.unexpected
    packed, padded = ragged()
    theirs_of = other if kind == "BertModel" else other.bert
    with torch.no_grad():
        hidden_TH = ours.network.bert(packed, Layout(packed["lengths"], packed["offsets"]))
        expected = theirs_of(**padded).last_hidden_state[padded["attention_mask"].bool()]
    torch.testing.assert_close(hidden_TH, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertModel", "BertForMaskedLM"])
def test_fine_tuning_begins_with_their_encoder(tmp_path, kind):
    other = theirs(kind)
    other.save_pretrained(tmp_path)
    ours = BertClassifier(network(), classes=3)
    fits = read_initial(ours, tmp_path, None)
    pooler = {"pooler"} if kind == "BertForMaskedLM" else set()
    assert {name.split(".")[1] for name in fits.missing} == {"output"} | pooler
    assert all(name.startswith("cls.") for name in fits.unexpected)
    state = other.state_dict()
    prefix = "" if kind == "BertModel" else "bert."
    key = ours.network.bert.layers[1].attention.key.weight
    assert torch.equal(key, state[f"{prefix}encoder.layer.1.attention.self.key.weight"])


def test_checkpoints_from_tensorflow_are_taken_by_the_names_of_their_layer_norms(tmp_path):
    other = theirs("BertForPreTraining")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in other.state_dict().items()
    }
    torch.save(old, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    ours = BertPretraining(network()).eval()
    fits = read_initial(ours, tmp_path / "pytorch_model.bin", None)
    assert not fits.missing
    assert fits.unexpected == ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"], "tied"
    compare(ours, other)


def test_another_depth_width_or_number_of_heads_is_refused(tmp_path):
    theirs("BertForPreTraining").save_pretrained(tmp_path)
    for size in ({"layers": 3}, {"hidden": 64}, {"positions": 16}):
        with pytest.raises(UserError, match=r"make model.network the same, or add init_prefix=/"):
            matched(BertPretraining(network(**size)), tmp_path, None)
    with pytest.raises(UserError, match=r"18 missing, .* make model.network the same, or add init_prefix=/"):
        matched(BertClassifier(network(layers=3)), tmp_path, None)
    with pytest.raises(UserError, match="none of its 46 tensors has a name and shape of the model's"):
        matched(BertClassifier(network(hidden=64), classes=3), tmp_path, None)
    assert matched(BertPretraining(network(layers=3)), tmp_path, "/").found, "what fits is wanted"
    for ours in (BertPretraining(network(heads=8)), BertClassifier(network(heads=8))):
        with pytest.raises(UserError, match=r"num_attention_heads is 4, the model's is 8; make model.network the same"):
            matched(ours, tmp_path, None)
    assert match(BertPretraining(network(heads=8)), open_weights(tmp_path)).is_whole, "the shapes do not tell"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read .* restore it, or remove it"):
        matched(BertPretraining(network()), tmp_path, None)
