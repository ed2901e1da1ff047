"""``paperscale estimate``: memory and throughput of a recipe, where there is neither data nor a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jobs.folders import write_attempt, write_run
from paperscale.cli import main
from paperscale.data import TokenBlocks, TokenDocuments
from paperscale.data.stream import Places
from paperscale.errors import UserError
from paperscale.jobs import estimating
from paperscale.recipes import RecipeArguments
from paperscale.training.estimate import Passes
from paperscale.training.gpus import GPUS, named, recognised
from paperscale.training.recipe import built_on_meta
from paperscale.training.strategies import NAMES
from paperscale.training.throughput import UTILISATION, work

RESNET = """\
model:
  class_path: paperscale.papers.resnet.ResNetClassifier
  init_args:
    network: {class_path: paperscale.papers.resnet.ResNet, init_args: {depth: 50, bottleneck_stride: 3x3}}
    classes: 1000
data:
  class_path: paperscale.data.ImageShards
  init_args: {path: nowhere/imagenet, global_batch_size: 256, size: 224}
trainer: {max_epochs: 90, precision: bf16-mixed}
"""


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose shards are not here."""
    path = tmp_path_factory.mktemp("imagenet") / "resnet50.yaml"
    path.write_text(RESNET)
    return path


@pytest.fixture(scope="module")
def resnet50(imagenet: Path) -> Passes:
    """Its training steps on one GPU."""
    return Passes(built_on_meta(RecipeArguments.parse([str(imagenet)]).to_cli()), 1)


def found(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["estimate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_resnet_152_is_estimated_without_data_and_without_a_gpu(imagenet, runs, capsys):
    network = ("model.network.init_args.depth=152", "model.network.init_args.bottleneck_stride=1x1")
    of = found(capsys, str(imagenet), *network, "--samples", "1281167", "--gpu", "a100 80gb", "--nodes", "8")
    assert of["parameters"] == of["trainable"] == 60_192_808
    assert (of["precision"], of["gpu"]["name"], of["batch"]["samples"]) == ("bf16-mixed", "A100-80", 4)
    assert of["data"]["missing"] == ["nowhere/imagenet"]
    rows = {row["strategy"]: row for row in of["strategies"]}
    assert list(rows) == list(NAMES)
    assert rows["ddp"]["weights"] == 4 * of["parameters"]
    assert rows["deepspeed_zero1"]["optimizer"] == -(-8 * of["parameters"] // 64)
    assert all(row["fits"] and row["largest_micro_batch"] > 500 for row in rows.values())
    compute = of["compute"]
    assert 11.2e9 < compute["forward_macs"] < 11.4e9, "the paper's 11.3 billion"
    slow, fast = compute["samples_per_s"]
    assert fast == pytest.approx(2 * slow)
    assert compute["training_s"] == pytest.approx([90 * 1281167 / slow, 90 * 1281167 / fast])


def test_the_largest_micro_batch_fits_and_one_more_does_not(tiny_recipe):
    cli = built_on_meta(RecipeArguments.parse([str(tiny_recipe), "data.path=/nowhere", "data.size=8"]).to_cli())
    for room in (100 << 20, 1 << 30):
        largest = Passes(cli, 2).largest("32-true", room)
        more = [Passes(cli, 2, largest + samples).under("ddp").activations for samples in (0, 1)]
        assert more[0] <= room < more[1]
    assert Passes(cli, 2).largest("32-true", 1000) == 0


def test_operations_are_what_torch_counts(resnet50):
    counted = work(resnet50, "32-true")
    fake, model, batch = resnet50.prepared("32-true")
    with fake, FlopCounterMode(display=False) as counter:
        loss = model.training_step(batch, 0)
        forward = counter.get_total_flops()
        loss.backward()
    assert 256 * counted.forward_flops == forward
    assert 256 * counted.backward_flops == counter.get_total_flops() - forward


def test_with_checkpointing_blocks_are_computed_twice(tiny_recipe):
    words = ([str(tiny_recipe), f"speed.activation_checkpointing={kind}"] for kind in ("none", "blocks"))
    once, twice = (work(Passes(built_on_meta(RecipeArguments.parse(parts).to_cli()), 1), "32-true") for parts in words)
    assert twice.forward_flops == once.forward_flops
    stem, last = 2 * 9 * 16 * 64, 2 * 64 * 8  # the first convolution and the last layer, which are in no block
    assert twice.backward_flops - once.backward_flops == once.forward_flops - stem - last


@pytest.mark.parametrize(
    ("gpu", "precision", "published"),
    [
        ("V100-16", "32-true", 367),
        ("V100-16", "16-mixed", 1200),
        ("A100-80", "32-true", 938),
        ("A100-80", "16-mixed", 2470),
    ],
)
def test_published_rates_of_resnet_50_lie_where_the_estimate_says(resnet50, gpu, precision, published):
    """NVIDIA's own, of one GPU: DeepLearningExamples, ResNet50 v1.5 for PyTorch, container 21.03."""
    rate = resnet50.samples / work(resnet50, precision).seconds(GPUS[gpu], tf32=True)
    assert UTILISATION[0] <= round(published / rate, 2) <= UTILISATION[1]


def test_of_a_pipeline_of_the_users_own_only_the_batches_are_unknown(tiny_recipe):
    data = "{class_path: paperscale.data.WebDatasetStream, init_args: {pipeline: builtins:iter, steps_per_epoch: 2, "
    words = [str(tiny_recipe), "data=null", f"data={data}global_batch_size: 32}}}}"]
    of = Passes(built_on_meta(RecipeArguments.parse(words).to_cli()), 2)
    memory = of.under("ddp")
    assert (memory.samples, memory.activations, memory.optimizer) == (16, None, memory.parameters)
    assert memory.unknown == (
        "activations unknown: LookupError: batches are made by data.pipeline, which is not asked for one",
    )


def test_shapes_of_texts_that_are_not_here():
    blocks, missing = TokenBlocks("nowhere", length=16, next_token=True).without_shards()
    assert missing == ["nowhere"]
    source = blocks.source("train")
    assert blocks.allocate_for(source, Places(source, *blocks._base_order(source).take(0, 0, 2)), True)[
        "targets"
    ].shape == (2, 16)
    documents, _ = TokenDocuments("nowhere", fields=["source", "target"], max_tokens=100, max_length=9).without_shards()
    source = documents.source("train")
    order, batches = documents.batches(source, documents._base_order(source))
    assert batches.stop(0, 0) == 100 // 9
    batch = documents.allocate_for(source, Places(source, *order.take(0, 0, 3)), True)
    assert batch["target"].shape == (3, 9)
    with pytest.raises(UserError, match=r"data\.max_length=128"):
        TokenDocuments("nowhere").without_shards()


def test_runs_that_have_finished_are_shown_beside_it(runs, tiny_recipe, capsys):
    for number, rate in enumerate((100.0, 200.0)):
        run = write_run(runs, f"tiny-{number}", recipe="tiny", nodes=1)
        (run.path / "results.json").write_text(json.dumps({"samples_per_s": rate}))
    attempt = write_attempt(run, 1)
    (attempt.path / "preflight.json").write_text('{"device": "NVIDIA H200"}')
    write_run(runs, "another", recipe="other")
    measured = estimating.measured("tiny")
    assert {row["run"]: (row["samples_per_s"], row["device"]) for row in measured} == {
        "tiny-0": (100.0, None),
        "tiny-1": (200.0, "NVIDIA H200"),
    }
    assert main(["estimate", str(tiny_recipe), "--strategy", "ddp", "--cluster", "gpu", "--utilisation", "50"]) == 0
    out = capsys.readouterr().out
    assert "200 samples/s in tiny-1: 1 x 1 processes, NVIDIA H200" in out
    assert "1 x 8 GPUs, unnamed, 80.0 GiB, of the profile" in out
    assert re.search("^note +batch normalisation over 4 samples.* use fewer GPUs, 4 at most$", out, re.MULTILINE)
    assert "the rates of the GPU 'unnamed' are not known; name a like one with --gpu" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "H10"], "known are V100-16"),
        (["--strategy", "dpd"], "there is no such strategy; did you mean 'ddp'?"),
        (["--utilisation", "80-40"], "is no range of per cent: write 40-80"),
        (["--cluster", "slurm"], "name them with --gpu, such as --gpu A100-80"),
        (["data.path=/nowhere"], "data.size does not say how large its images are; set it"),
        (["--nodes", "100"], "data.global_batch_size=32 cannot be divided over 800 processes"),
        (["speed.activation_checkpointing=blocks", "model.network.class_path=helpers.Linear"], "repeats no block"),
    ],
)
def test_mistakes_of_an_estimate_end_in_the_fix(words, message, runs, tiny_recipe, capsys):
    assert main(["estimate", str(tiny_recipe), *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_gpu_may_be_named_without_its_memory_where_there_is_one_of_the_kind():
    assert named("H100") is GPUS["H100-80"]
    with pytest.raises(UserError, match=r"say of which memory, A100-40 or A100-80$"):
        named("a100")


@pytest.mark.parametrize(
    ("driver", "gib", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.5, "A100-40"),
        ("NVIDIA A100 80GB PCIe", 79.2, "A100-80"),
        ("Tesla V100-SXM2-32GB", 31.7, "V100-32"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX4090"),
        ("NVIDIA A10", 22.1, "A10"),
        ("NVIDIA H200", 139.8, "H200"),
        ("h100", 80, "H100-80"),
        ("Quadro", 8, "Quadro"),
    ],
)
def test_a_gpu_is_recognised_by_what_its_driver_calls_it(driver, gib, name):
    memory = int(gib * 2**30)
    assert (recognised(driver, memory).name, recognised(driver, memory).memory) == (name, memory)
    assert name == "Quadro" or named(name) is GPUS[name]
    assert not torch.cuda.is_available() or recognised(torch.cuda.get_device_name(0), memory).rates
