"""Weights of divided checkpoints: written as one file, renamed, averaged, and given to models under any strategy."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from paperscale.bench.consolidate import measure, write_toy
from paperscale.errors import UserError
from paperscale.jobs.exporting import export_as
from paperscale.papers.resnet import ResNet, ResNetClassifier
from paperscale.training import consolidate
from paperscale.training.checkpoint import publish
from paperscale.training.initial import match, matched, read_initial, renamed
from paperscale.training.pieces import Piece, persistent_buffers, to_write
from paperscale.training.saving import write_durably
from paperscale.training.tensorfile import Buffer, TensorReader, tensor_file
from paperscale.training.weights import mean, of_checkpoint, open_weights, read_weights
from strategy_rank import Small
from test_strategies import ALL, at, tensors, train


class Tied(nn.Module):
    """Weights of two names, types of several sizes, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.small = nn.Parameter(torch.randn(5).bfloat16())
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)


class Exportable(LightningModule):
    """Has the names of another library, as a paper's module may.

    Args:
        embedding: its name here.
        formats: libraries that have such a model.
    """

    def __init__(self, embedding: str = "net.embed.weight", formats: tuple[str, ...] = ("torchvision", "huggingface")):
        super().__init__()
        self.net, self.embedding, self.formats = Tied(), embedding, formats

    def export_names(self, format: str) -> dict[str, str] | None:
        names = {self.embedding: "wte.weight", "net.head.weight": "lm_head.weight", "net.norm.weight": "ln.gamma"}
        return names if format in self.formats else None

    def export_config(self, format: str) -> dict[str, Any]:
        return {"model_type": "tied", "vocab_size": 11}


def recipe_of(data: Path, **arguments: Any) -> str:
    model = {"class_path": "test_export.Exportable", "init_args": arguments}
    shards = {"class_path": "paperscale.data.ImageShards", "init_args": {"path": str(data), "global_batch_size": 8}}
    return yaml.safe_dump({"model": model, "data": shards})


def save(model: nn.Module, folder: Path, ranks: int, recipe: str = "model: {}\n") -> Path:
    """Write a checkpoint as ``ranks`` ranks of DDP do."""
    folder.mkdir(parents=True)
    names = {id(p): name for name, p in model.named_parameters()}
    pieces = [Piece(f"model/{n}", tuple(p.shape), 0, p.detach(), replicated=True) for n, p in model.named_parameters()]
    buffers = [Piece(f"model/{n}", tuple(b.shape), 0, b) for n, b in persistent_buffers(model)]
    files = {"recipe.yaml": write_durably(folder / "recipe.yaml", [recipe.encode()])}
    for rank in range(ranks):
        content = Buffer().take([*to_write(pieces, rank, ranks), *(buffers if rank == 0 else [])])
        files[tensor_file(rank)] = write_durably(folder / tensor_file(rank), content)
    tied = model.named_parameters(remove_duplicate=False)
    facts = {
        "step": int(folder.name[-1]),
        "consumed": 0,
        "world_size": ranks,
        "aliases": {name: names[id(p)] for name, p in tied if names[id(p)] != name},
        "buffers": [name for name, _ in persistent_buffers(model)],
    }
    publish(folder, folder.with_name(f"step-{folder.name[-1]}"), files, facts)
    return folder.with_name(f"step-{folder.name[-1]}")


def test_one_file_of_many_holds_the_same_and_is_read_as_every_model_is(tmp_path, monkeypatch):
    monkeypatch.setattr(consolidate, "_SLICE", 16)
    model, other = Tied(), Tied()
    checkpoint = save(model, tmp_path / "new-1", 3)
    written = consolidate.write_file(of_checkpoint(checkpoint), tmp_path / "one.safetensors")
    assert written["bytes"] == (tmp_path / "one.safetensors").stat().st_size
    load_model(other, str(tmp_path / "one.safetensors"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    with safe_open(str(tmp_path / "one.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    read_weights(third := Tied(), open_weights(tmp_path / "one.safetensors"))
    assert torch.equal(third.small, model.small)
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_a_failure_leaves_no_half_of_a_file(tmp_path):
    checkpoint = save(Tied(), tmp_path / "new-1", 2)
    whole = of_checkpoint(checkpoint)
    file = checkpoint / tensor_file(1)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"tensors-00001.safetensors is cut short; restore it"):
        consolidate.write_file(whole, tmp_path / "one.safetensors")
    with pytest.raises(UserError, match=r"tensors-00001.safetensors: not a readable file of tensors"):
        of_checkpoint(checkpoint)
    file.unlink()
    with pytest.raises(UserError, match=r"has 33 of the elements 0 to 66; a file is missing"):
        consolidate.write_checkpoint(of_checkpoint(checkpoint), tmp_path / "w", checkpoint, None)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]


def test_the_mean_of_checkpoints_of_other_models_is_refused(tmp_path):
    first, second = (of_checkpoint(save(Tied(), tmp_path / f"new-{n}", n)) for n in (1, 2))
    both = mean([first, second])
    whole = [of.tensors["small"].read(0, 5).double() for of in (first, second)]
    assert torch.equal(both.tensors["small"].read(0, 5), (sum(whole) / 2).float()), "of bfloat16, in float32"
    other = of_checkpoint(save(nn.Linear(2, 2), tmp_path / "new-3", 1))
    with pytest.raises(UserError, match=r"differ in bias; average checkpoints of one model"):
        mean([first, other])
    with pytest.raises(UserError, match=r"holds no averages.* leave --ema out"):
        of_checkpoint(tmp_path / "step-1", averages=True)


def test_a_paper_gives_its_weights_the_names_of_another_library(tmp_path, tiny_shards):
    module = Exportable()
    checkpoint = save(module, tmp_path / "new-1", 2, recipe_of(tiny_shards))
    weights = of_checkpoint(checkpoint)
    export_as("torchvision", checkpoint, weights, tmp_path / "tv.safetensors", None, {})
    found = load_file(tmp_path / "tv.safetensors")
    assert sorted(found) == ["lm_head.weight", "ln.gamma", "wte.weight"]
    assert torch.equal(found["lm_head.weight"], module.net.embed.weight)
    export_as("huggingface", checkpoint, weights, tmp_path / "hf", torch.bfloat16, {"paperscale.step": "1"})
    assert json.loads((tmp_path / "hf/config.json").read_text()) == {"model_type": "tied", "vocab_size": 11}
    assert load_file(tmp_path / "hf/model.safetensors")["wte.weight"].dtype == torch.bfloat16
    (checkpoint / "recipe.yaml").write_text(recipe_of(tiny_shards, embedding="net.embed.wight"))
    with pytest.raises(UserError, match=r"has no 'net.embed.wight'; did you mean 'net.embed.weight'\?"):
        export_as("huggingface", checkpoint, weights, tmp_path / "no", None, {})
    (checkpoint / "recipe.yaml").write_text(recipe_of(tiny_shards, formats=["torchvision"]))
    with pytest.raises(UserError, match=r"huggingface has no network like Exportable; leave --format out"):
        export_as("huggingface", checkpoint, weights, tmp_path / "no", None, {})
    network = {"class_path": "paperscale.papers.resnet.ResNet", "init_args": {"depth": 18, "shortcut": "A"}}
    model = {"class_path": "paperscale.papers.resnet.ResNetClassifier", "init_args": {"network": network}}
    recipe = {**yaml.safe_load(recipe_of(tiny_shards)), "model": model}
    (checkpoint / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=r"torchvision has no ResNet-18 with shortcut=A.*leave --format out"):
        export_as("torchvision", checkpoint, weights, tmp_path / "no", None, {})
    (checkpoint / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": {"class_path": "strategy_rank.Small"}}))
    with pytest.raises(UserError, match=r"Small has no export_names.*leave --format out"):
        export_as("torchvision", checkpoint, weights, tmp_path / "no", None, {})
    assert not (tmp_path / "no").exists()


def test_tied_weights_fit_by_either_of_their_names(tmp_path):
    model = Tied()
    weights = of_checkpoint(save(model, tmp_path / "new-1", 1))
    assert match(Tied(), weights).is_whole
    state = {"head.weight": model.embed.weight.detach().clone(), "small": model.small.detach().float()}
    save_file(state, tmp_path / "head.safetensors")
    fits = read_initial(other := Tied(), tmp_path / "head.safetensors", None)
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert torch.equal(other.small, model.small), "converted"
    assert (fits.missing[0], fits.unexpected) == ("norm.weight", [])
    assert len(list(match(nn.ModuleList([Tied() for _ in range(9)]), renamed(weights, "/0.")).lines())) > 9


def test_weights_are_known_by_the_names_of_another_library(tmp_path):
    model, other = (ResNetClassifier(ResNet(18, classes=10)) for _ in range(2))
    state, names = model.state_dict(), model.export_names("torchvision")
    foreign = {names[name]: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}
    foreign |= {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}
    path = tmp_path / "old.pth"
    torch.save(foreign, path, _use_new_zipfile_serialization=False)  # as PyTorch wrote it before 1.6
    before = other.network.fc.weight.clone()
    fits = read_initial(other, path, None)
    assert str(fits) == f"100 tensors from {path}, named as torchvision names them, 2 of another shape"
    assert torch.equal(other.network.conv5_x[1].conv2.weight, model.network.conv5_x[1].conv2.weight)
    assert torch.equal(other.network.conv3_x[0].shortcut[1].bias, state["network.conv3_x.0.shortcut.1.bias"])
    assert torch.equal(other.network.fc.weight, before), "trained from the beginning"
    parallel = {f"module.{name}": tensor for name, tensor in foreign.items()}
    torch.save({"model": parallel, "args": argparse.Namespace(lr=0.1)}, tmp_path / "parallel.pth")
    with pytest.raises(
        UserError, match=r"'module.' taken off they give 100 of the model's 122: add init_prefix=module./"
    ):
        match(other, open_weights(tmp_path / "parallel.pth"))
    weights = renamed(open_weights(tmp_path / "parallel.pth"), "module./")
    assert (match(other, weights).library, match(other, weights).missing) == ("torchvision", [])
    assert match(other, replace(weights, tensors={f"network.{n}": w for n, w in weights.tensors.items()})).library == ""


def test_weights_of_another_depth_or_shortcut_under_the_names_of_a_library_are_refused(tmp_path):
    def made(depth: int, **options: Any) -> ResNetClassifier:
        with torch.device("meta"):
            return ResNetClassifier(ResNet(depth, **options), classes=1000)

    source = made(18)
    names, state = source.export_names("torchvision"), source.state_dict()
    foreign = {names[name]: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    path = tmp_path / "resnet18.safetensors"
    save_file(foreign, path)
    deeper = r"122 tensors from .*, named as torchvision names them, 80 missing \(network.conv2_x.2.conv1.weight\): "
    with pytest.raises(UserError, match=deeper + ".* add init_prefix=/ to begin with what fits$"):
        matched(made(34), path, None)
    assert len(matched(made(34), path, "/").found) == 122, "a part is wanted"
    with pytest.raises(UserError, match=r"165 missing, 24 of another shape .* perhaps of another"):
        matched(made(50, bottleneck_stride="3x3"), path, None)
    with pytest.raises(UserError, match=r"80 missing .* use the recipe that made it$"):
        matched(made(34), path, "/", whole=True)
    with pytest.raises(UserError, match="if its names are torchvision's: torchvision has no ResNet-18 with shortcut=A"):
        matched(made(18, shortcut="A"), path, None)
    save_file({f"model.{name}": torch.zeros(tensor.shape) for name, tensor in state.items()}, path)
    with pytest.raises(UserError, match=r"add init_prefix=model./$"):
        matched(made(18, shortcut="A"), path, None)
    backbone = {name: tensor for name, tensor in foreign.items() if not name.startswith("fc.")}
    save_file(backbone, path)
    assert matched(made(18), path, None).missing == ["network.fc.weight", "network.fc.bias"], "a new last layer"


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("this code has run",))


def test_files_that_would_run_code_are_refused_and_plain_state_dicts_are_read(tmp_path, capsys):
    torch.save({"weight": torch.ones(2), "more": Hostile()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil.pt is not read.*write its state dict with safetensors"):
        open_weights(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""
    torch.save({"state_dict": {"model.weight": torch.arange(6.0).view(2, 3)}, "epoch": 3}, tmp_path / "good.ckpt")
    weights = renamed(open_weights(tmp_path / "good.ckpt"), "model./")
    assert weights.tensors["weight"].read(2, 5).tolist() == [2.0, 3.0, 4.0]
    torch.save({"epoch": 3}, tmp_path / "none.bin")
    with pytest.raises(UserError, match="holds no state dict"):
        open_weights(tmp_path / "none.bin")
    with pytest.raises(UserError, match="write OLD/NEW"):
        renamed(weights, "model")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="holds no weights; name a run"):
        open_weights(tmp_path / "folder")


@pytest.mark.parametrize(
    ("rename", "change"),
    [("model.{}", "model./"), ("module.encoder.{}", "module.encoder./"), ("{}", "")],
)
def test_the_prefix_that_makes_most_names_fit_is_suggested(tmp_path, rename, change):
    model = Small()
    state = {rename.format(name): tensor.detach().clone() for name, tensor in model.named_parameters()}
    save_file(state, tmp_path / "w.safetensors")
    weights = open_weights(tmp_path / "w.safetensors")
    if change:
        with pytest.raises(UserError, match=f"add init_prefix={change}$"):
            match(model, weights)
    assert len(match(model, renamed(weights, change)).found) == len(state)


def test_weights_of_nothing_alike_are_refused_with_both_names(tmp_path):
    save_file({"a.b": torch.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"\(it has a.b, the model scale\); use weights of this model"):
        match(Small(), open_weights(tmp_path / "w.safetensors"))


def test_a_divided_toy_is_written_as_it_is(tmp_path):
    checkpoint = write_toy(tmp_path / "step-1", 100_000, 3)
    weights = of_checkpoint(checkpoint)
    consolidate.write_file(weights, tmp_path / "one.safetensors")
    found, reader = load_file(tmp_path / "one.safetensors"), TensorReader(checkpoint)
    assert len(found) == 60
    for name, tensor in found.items():
        assert torch.equal(tensor, reader.whole(f"model/{name}"))


@pytest.mark.slow
def test_one_file_of_a_large_model_takes_less_memory_than_one_of_its_parts(tmp_path):
    for one in measure(100_000_000, 4, tmp_path):
        assert one.shard_bytes > 99_000_000
        assert one.copies < 1, str(one)


@pytest.mark.slow
def test_a_model_begins_with_the_same_weights_however_it_is_divided(tmp_path, tiny_shards):
    def job(strategy: str, name: str, **settings: Any) -> dict[str, Any]:
        return {"strategy": strategy, "steps": 1, "data": str(tiny_shards), "save": str(tmp_path / name), **settings}

    (tmp_path / "source").mkdir()
    train(tmp_path, 2, [{**job("fsdp", "source"), "steps": 5}])
    source = at(tmp_path / "source", 5)
    expected: dict[str, Tensor] = tensors(source)
    jobs = [job(strategy, strategy, initial=source, drop=1) for strategy in ALL]
    trained = train(tmp_path, 2, jobs)
    for strategy, one in zip(ALL, trained, strict=True):
        found = tensors(at(tmp_path / strategy, 1))
        for name, tensor in expected.items():
            if name.startswith("model/") and not name.endswith("seen"):
                assert torch.equal(found[name], tensor), (strategy, name)
        assert one == pytest.approx(trained[0], abs=2e-6), strategy
