"""BERT: counts, the packed network, pre-training's loss, fine-tuning, optimizers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import losses
from paperscale.cli import main
from paperscale.data import SegmentPairs
from paperscale.data.packing import pack
from paperscale.errors import UserError
from paperscale.jobs.run import Run, read_json
from paperscale.nn.attention import Layout
from paperscale.nn.optimizers import BertAdam
from paperscale.nn.schedules import polynomial, warmed_up
from paperscale.papers.bert import (
    EPS,
    Bert,
    BertChoice,
    BertClassifier,
    BertModule,
    BertPretraining,
    Pooler,
    PretrainingHeads,
    SequenceClassifier,
)
from paperscale.training.initial import read_initial
from tiny_text import choice, labelled, write_text

SMALL = {"size": "tiny", "vocab_size": 300, "layers": 2, "hidden": 32, "heads": 4}


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"), sizes={"train": 300, "val": 40, "test": 40})


# -- section 3: counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "vocabulary", "with_pooler", "pretraining", "masked_alone"),
    [
        ("base", 30522, 109_482_240, 110_106_428, 109_514_298),
        ("large", 30522, 335_141_888, 336_226_108, 335_174_458),
        ("base", 28996, 108_310_272, 108_932_934, None),
        ("large", 28996, 333_579_264, 334_661_958, None),
        ("tiny", 30522, 4_385_920, None, None),
        ("mini", 30522, 11_170_560, None, None),
        ("small", 30522, 28_763_648, None, None),
        ("medium", 30522, 41_373_184, None, None),
    ],
)
def test_parameters_are_those_of_the_published_models(size, vocabulary, with_pooler, pretraining, masked_alone):
    with torch.device("meta"):
        bert = Bert(size, vocabulary)
        assert count(bert, Pooler(bert.hidden)) == with_pooler
        assert pretraining in (None, count(PretrainingHeads(bert)))
        assert masked_alone in (None, count(PretrainingHeads(bert, pairs=False)))


@pytest.mark.parametrize(
    ("layers", "hidden", "heads"), [(3, 768, 12), (6, 768, 3), (6, 768, 12), (12, 1024, 16), (24, 1024, 16)]
)
def test_sizes_of_table_6(layers, hidden, heads):
    with torch.device("meta"):
        bert = Bert("base", 30522, layers, hidden, heads)
    assert (len(bert.layers), bert.hidden, bert.layers[0].attention.heads) == (layers, hidden, heads)
    assert bert.layers[0].inner.out_features == 4 * hidden


def test_the_output_layer_is_the_embeddings_with_a_bias_of_its_own():
    heads = PretrainingHeads(Bert(**SMALL))
    assert heads.places.weight is heads.bert.embeddings.token.weight
    assert heads.places.bias.shape == (300,)


def test_weights_are_drawn_as_in_the_original_code():
    heads = PretrainingHeads(Bert("tiny", 8192))
    for name, parameter in heads.named_parameters():
        if parameter.dim() > 1:
            assert abs(float(parameter.detach().std()) - 0.02 * 0.8796) < 0.002, name  # of a normal cut at 2 deviations
            assert float(parameter.detach().abs().max()) <= 0.04
        elif "norm.weight" in name:
            assert (parameter == 1).all()
        else:
            assert (parameter == 0).all()
    assert {part.eps for part in heads.modules() if isinstance(part, nn.LayerNorm)} == {EPS} == {1e-12}


# -- packed sequences --------------------------------------------------------------------------------------


def batch_of(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(5, 300, length) for length in lengths]
    return pack(tokens, [np.arange(length) >= length // 2 for length in lengths])


def alone(batch: dict[str, Any], row: int) -> dict[str, Any]:
    start, stop = batch["offsets"][row : row + 2].tolist()
    return pack([batch["tokens"][start:stop].numpy()], [batch["segment"][start:stop].numpy()])


@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_has_the_outputs_in_a_batch_that_it_has_alone(causal):
    heads = PretrainingHeads(Bert(**SMALL, causal=causal)).eval()
    lengths = [48, 48, 48, 48, 31, 30, 9, 1]
    batch = batch_of(lengths)
    tokens_TV, pairs_N2 = heads.logits(batch)
    for row, part in enumerate(tokens_TV.split(lengths)):
        of_part, of_pair = heads.logits(alone(batch, row))
        torch.testing.assert_close(part, of_part, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pairs_N2[row : row + 1], of_pair, rtol=1e-4, atol=1e-5)


def test_it_computes_what_the_equations_say():
    """Against the padded computation, written out: embeddings, post-norm layers, erf GELU, tanh pooler."""
    heads = PretrainingHeads(Bert(**SMALL)).eval()
    bert, batch = heads.bert, batch_of([12])
    x = bert.embeddings.token.weight[batch["tokens"]] + bert.embeddings.segment.weight[batch["segment"]]
    x = normed(x + bert.embeddings.position.weight[:12], bert.embeddings.norm)
    for layer in bert.layers:
        of = layer.attention
        q, k, v = (part(x).view(12, 4, 8).transpose(0, 1) for part in (of.query, of.key, of.value))
        weights = (q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1)
        x = normed(x + of.output((weights @ v).transpose(0, 1).reshape(12, 32)), layer.attention_norm)
        inner = layer.inner(x)
        x = normed(x + layer.outer(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))), layer.norm)
    layout = Layout(batch["lengths"], batch["offsets"])
    torch.testing.assert_close(bert(batch, layout), x, rtol=1e-4, atol=1e-5)
    pooled = torch.tanh(heads.pooler.dense(x[:1]))
    torch.testing.assert_close(heads.logits(batch)[1], heads.pair(pooled), rtol=1e-4, atol=1e-5)


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    deviation = x - x.mean(-1, keepdim=True)
    return deviation / (deviation.square().mean(-1, keepdim=True) + 1e-12).sqrt() * norm.weight + norm.bias


def test_left_to_right_nothing_sees_what_follows():
    bert = Bert(**SMALL, causal=True).eval()
    batch = batch_of([20, 20])
    layout = Layout(batch["lengths"], batch["offsets"])
    before = bert(batch, layout)
    batch["tokens"][15] = 7
    after = bert(batch, layout)
    assert torch.equal(before[:15], after[:15])
    assert not torch.allclose(before[15:20], after[15:20])
    assert torch.equal(before[20:], after[20:])


def test_a_sequence_longer_than_the_positions_is_refused():
    bert = Bert(**SMALL, positions=16)
    batch = batch_of([20])
    with pytest.raises(UserError, match=r"20 tokens.*network.positions=16.*data.length"):
        bert(batch, Layout(batch["lengths"], batch["offsets"]))


# -- section 3.1: pre-training ------------------------------------------------------------------------------


def data_of(text: Path, **options: Any) -> SegmentPairs:
    return SegmentPairs(str(text), **{"global_batch_size": 32, "length": 48, "seed": 1, "num_threads": 0, **options})


def first_batch(text: Path, **options: Any) -> dict[str, Any]:
    return next(iter(data_of(text, **options).train_dataloader()))


def module_of(**options: Any) -> BertPretraining:
    torch.manual_seed(0)
    module = BertPretraining(Bert(**{**SMALL, "dropout": 0.0, "attention_dropout": 0.0}), **options)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    return module


def test_the_loss_begins_at_ln_v_and_ln_2(text):
    loss = module_of().training_step(first_batch(text), 0)
    assert abs(float(loss.detach()) - math.log(300) - math.log(2)) < 0.05
    loss = module_of(pairs=False).training_step(first_batch(text, next_sentence="none"), 0)
    assert abs(float(loss.detach()) - math.log(300)) < 0.05


def test_the_loss_is_the_mean_over_sequences_of_the_mean_over_their_masked_tokens(text):
    module, batch = module_of(), first_batch(text)
    tokens_TV, pairs_N2 = module.network.logits(batch)
    entropy = F.cross_entropy(tokens_TV[batch["places"]], batch["targets"], reduction="none")
    owner = torch.searchsorted(batch["offsets"][1:].long(), batch["places"], right=True)
    means = [entropy[owner == row].mean() for row in range(32)]
    wanted = torch.stack(means).mean() + F.cross_entropy(pairs_N2, batch["label"])
    torch.testing.assert_close(module.training_step(batch, 0), wanted)


def test_the_gradient_does_not_depend_on_how_a_batch_is_divided(text):
    def gradients(**options: Any) -> list[Tensor]:
        module, data = module_of(), data_of(text, **options)
        passes = data.accumulate(1)
        for _, batch in zip(range(passes), data.train_dataloader(), strict=False):
            (module.training_step(batch, 0) * batch["cursor"].weight / passes).backward()
        return [parameter.grad for parameter in module.parameters()]

    for whole, parts in zip(gradients(), gradients(micro_batch_size=5), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


RECIPE = """\
# BERT on small text    the test suite
# run       paperscale fit bert.yaml
# needs     seconds
# paper     none
# measured  none
seed_everything: 1
model:
  class_path: paperscale.papers.bert.{kind}
  init_args:
    network:
      class_path: paperscale.papers.bert.Bert
      init_args: {{size: tiny, vocab_size: 300, layers: 1, hidden: 32, heads: 4}}
    lr: 1.0e-2
    warmup: 5
data:
  class_path: paperscale.data.{stream}
  init_args: {{path: {path}, global_batch_size: 32, length: 48}}
trainer: {{max_epochs: {epochs}, log_every_n_steps: 1, gradient_clip_val: 1.0}}
checkpoint: {{every_n_steps: 50}}
tracking: {{enabled: false}}
"""


def recipe(folder: Path, path: Path, kind: str = "BertPretraining", stream: str = "SegmentPairs", epochs: int = 2):
    (file := folder / "bert.yaml").write_text(RECIPE.format(kind=kind, stream=stream, path=path, epochs=epochs))
    return str(file)


def test_a_run_trains_validates_and_is_tested(runs, tmp_path, text):
    assert main(["fit", recipe(tmp_path, text), "--name", "pre"]) == 0
    found = losses(Run(runs / "pre"))
    assert found[0][1] > found[-1][1] + 0.2
    results = read_json(runs / "pre/results.json")
    for name in ("val/mlm_loss", "test/mlm_loss", "test/mlm_accuracy", "test/nsp_accuracy", "test/perplexity"):
        assert name in str(results)


def test_networks_and_data_that_do_not_go_together_are_refused(runs, tmp_path, text, capsys):
    path = recipe(tmp_path, text)
    for word, what in (
        ("data.next_sentence=none", "set model.pairs=false"),
        ("data.objective=left-to-right", "set model.network.causal=true"),
        ("model.network.vocab_size=200", "set model.network.vocab_size=300"),
        ("model.network.positions=40", "data.length=48 and model.network.positions=40"),
        ("model.network.layers=0", "model.network.layers must be at least 1"),
        ("model.lr=-1", "model.lr must be at least 0"),
        ("model.betas=[2,3]", "two numbers from 0 to below 1"),
        ("model.power=-1", "model.power must be at least 0"),
        ("model.warmup=1.5", "a share of the training below 1"),
        ("data.mask_mix=[1,0]", "give three shares"),
        ("model.network.size=huge", "there are tiny, mini"),
        ("model.network.hidden=30", "30 cannot be divided over 4 heads"),
    ):
        assert main(["fit", path, word, "--name", "wrong"]) == 2
        assert what in capsys.readouterr().err
    assert not (runs / "wrong").exists()


# -- optimizers ----------------------------------------------------------------------------------------------


def test_bert_adam_takes_the_first_steps_of_the_original_code():
    x = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = BertAdam([x], lr=0.1, weight_decay=0.01)
    m = v = torch.zeros(2)
    wanted = x.detach().clone()
    for _ in range(3):
        gradient = 2 * wanted
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        wanted = wanted - 0.1 * (m / (v.sqrt() + 1e-6) + 0.01 * wanted)
        optimizer.zero_grad()
        x.square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(x.detach(), wanted)


def test_bert_adams_first_step_is_three_times_adams():
    x, y = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    for parameter, optimizer in ((x, BertAdam([x], 0.1, weight_decay=0.0)), (y, torch.optim.Adam([y], 0.1))):
        parameter.grad = torch.ones(1)
        optimizer.step()
    x, y = x.detach(), y.detach()
    assert abs(float((1 - x) / (1 - y)) - 0.1 / math.sqrt(0.001)) < 1e-3


def test_the_rate_rises_and_falls_as_in_the_paper():
    factor = warmed_up(polynomial(1_000_000), 10_000)
    assert factor(4_999) == 0.5
    assert factor(10_000) == 0.99
    assert factor(1_000_000) == 0
    assert warmed_up(polynomial(100, 0.5), 10)(75) == 0.5


def test_a_second_phase_goes_on_where_the_first_has_stopped():
    module = module_of(lr=1.0, warmup=10, total_steps=100, first_step=90)
    module._trainer = SimpleNamespace(estimated_stepping_batches=10)  # type: ignore[assignment]
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]  # type: ignore[index,call-overload]
    assert schedule.get_last_lr()[0] == pytest.approx(0.1)


def test_biases_and_norms_do_not_decay():
    module = module_of()
    module._trainer = SimpleNamespace(estimated_stepping_batches=10)  # type: ignore[assignment]
    decayed, free = module.configure_optimizers()["optimizer"].param_groups  # type: ignore[index,call-overload]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in free["params"])


def test_the_tokens_embeddings_may_learn_at_their_own_rate():
    module = module_of(lr=1e-4, embeddings_lr=30.0)
    module._trainer = SimpleNamespace(estimated_stepping_batches=10)  # type: ignore[assignment]
    groups = module.configure_optimizers()["optimizer"].param_groups  # type: ignore[index,call-overload]
    rates = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    token = module.bert.embeddings.token.weight
    assert rates.pop(id(token)) == pytest.approx(3e-3)
    assert set(rates.values()) == {1e-4}
    assert len(rates) + 1 == len(list(module.parameters()))


def test_a_network_of_more_positions_begins_with_those_of_the_weights_again_and_again(tmp_path):
    short, long = (BertPretraining(Bert(**SMALL, positions=positions)) for positions in (32, 80))
    torch.save(short.state_dict(), path := tmp_path / "short.pt")
    fits = read_initial(long, path, None)
    learned, begun = (module.bert.embeddings.position.weight for module in (short, long))
    assert torch.equal(begun, learned.repeat(3, 1)[:80])
    name = "network.bert.embeddings.position.weight: [32, 32], the model has [80, 32]"
    assert f"  repeated for the further rows: {name}" in fits.lines()
    with pytest.raises(UserError, match="use the recipe that made it"):
        read_initial(long, path, None, whole=True)
    torch.save(long.state_dict(), path)
    assert read_initial(short, path, None).other_shape, "fewer are not taken from more"


# -- section 4: fine-tuning ----------------------------------------------------------------------------------


def test_pairs_are_learned_from_the_weights_of_the_pre_training(runs, tmp_path, text, capsys):
    pairs = write_text(tmp_path / "pairs", labelled, {"train": 600, "val": 100, "test": 100}, ["other", "same"])
    assert main(["fit", recipe(tmp_path, text, epochs=1), "--name", "pre"]) == 0
    path = recipe(tmp_path, pairs, "BertClassifier", "LabelledText", epochs=1)
    assert main(["fit", path, "--name", "fine", "init_from=pre"]) == 0
    said = capsys.readouterr().out
    assert "missing, drawn as the recipe says: network.output.weight" in said
    assert "missing, drawn as the recipe says: network.bert" not in said
    assert "test/accuracy" in str(read_json(runs / "fine/results.json"))


def test_a_set_of_other_tokens_is_refused(runs, tmp_path, text, capsys):
    """Of another tokenizer of the same size: nothing else would tell."""
    assert main(["fit", recipe(tmp_path, text, epochs=1), "--name", "pre"]) == 0
    pairs = write_text(tmp_path / "pairs", labelled, {"train": 40, "val": 8, "test": 8}, ["other", "same"])
    definition = (pairs / "tokenizer.json").read_text().replace('"w5"', '"other"')
    (pairs / "tokenizer.json").write_text(definition)
    path = recipe(tmp_path, pairs, "BertClassifier", "LabelledText", epochs=1)
    capsys.readouterr()
    assert main(["fit", path, "--name", "fine", "init_from=pre"]) == 2
    assert f"--tokenizer {text / 'tokenizer.json'}" in capsys.readouterr().err
    assert not (runs / "fine").exists()
    assert main(["test", "pre", f"data.path={pairs}"]) == 2
    assert "is read with others" in capsys.readouterr().err


def test_another_number_of_classes_or_endings_is_refused(runs, tmp_path, capsys):
    pairs = write_text(tmp_path / "pairs", labelled, {"train": 40, "val": 8, "test": 8}, ["other", "same"])
    path = recipe(tmp_path, pairs, "BertClassifier", "LabelledText", epochs=1)
    assert main(["fit", path, "--name", "fine", "model.classes=3"]) == 2
    assert "has 2 classes, and model.classes=3: set it to 2" in capsys.readouterr().err
    assert not (runs / "fine").exists()


def test_weights_of_another_width_are_named_with_both(runs, tmp_path, text, capsys):
    assert main(["fit", recipe(tmp_path, text, epochs=1), "--name", "pre", "trainer.max_steps=1"]) == 0
    path = recipe(tmp_path, text, epochs=1)
    capsys.readouterr()
    assert main(["fit", path, "--name", "wide", "init_from=pre", "model.network.hidden=64"]) == 2
    said = capsys.readouterr().err
    assert "[300, 32]" in said
    assert "[300, 64]" in said


def test_choices_are_scored_beside_each_other(tmp_path):
    path = write_text(tmp_path / "choices", choice, {"train": 40, "val": 10, "test": 10}, "0123")
    from paperscale.data import Choices

    batch = next(iter(Choices(str(path), 8, num_threads=0).train_dataloader()))
    module = BertChoice(Bert(**SMALL)).eval()
    scores = module.network(batch)
    assert len(batch["lengths"]) == 32
    assert scores.shape == (8, 4)
    for row in (0, 13, 31):
        torch.testing.assert_close(module.network.of_sequences(alone(batch, row))[0], scores.flatten()[row : row + 1])


@pytest.mark.parametrize("bilstm", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_classifier_scores_a_sequence_in_a_batch_as_alone(bilstm, causal):
    network = SequenceClassifier(Bert(**SMALL, causal=causal), 3, bilstm=bilstm).eval()
    batch = batch_of([20, 31, 7])
    found = network(batch)
    for row in range(3):
        torch.testing.assert_close(network(alone(batch, row)), found[row : row + 1], rtol=1e-4, atol=1e-5)


def test_scores_are_learned_by_their_squared_error():
    module = BertClassifier(Bert(**SMALL), classes=1)
    assert module.metrics == ["pearson", "spearman"]
    assert module.loss(torch.tensor([[2.0], [5.0]]), torch.tensor([1.0, 3.0])) == 2.5


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"metrics": ["acuracy"]}, "did you mean 'accuracy'"),
        ({"metrics": ["pearson"]}, "a metric of scores"),
        ({"classes": 1, "metrics": ["f1"]}, "a metric of classes"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(options, what):
    with pytest.raises(UserError, match=what):
        BertClassifier(Bert(**SMALL), **options)


def test_a_negative_warm_up_is_refused():
    with pytest.raises(UserError, match=r"model\.warmup=-1"):
        BertModule(warmup=-1)
