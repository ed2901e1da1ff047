"""Which peers there are, and the environments they live in."""

from __future__ import annotations

from dataclasses import dataclass

RATES = frozenset({"raw", "tokens", "decode", "memory"})
ALL = RATES | {"first", "resume", "shuffle"}
IMAGES_ONLY = ALL - {"tokens", "first"}
TOKENS_ONLY = frozenset({"tokens", "first", "planning"})


@dataclass(frozen=True)
class Entry:
    """A peer.

    Attributes:
        title: name for people.
        module: module of :mod:`paperscale.bench.peers`.
        peer: its class there.
        environment: key of :data:`ENVIRONMENTS`; empty for Paperscale's own interpreter.
        distributions: packages that make the peer, whose versions are recorded.
        works: what it can do.
        note: what a reader of its figures must know.
    """

    title: str
    module: str
    peer: str
    environment: str
    distributions: tuple[str, ...]
    works: frozenset[str]
    note: str = ""


PEERS = {
    "ours": Entry("Paperscale", "ours", "Peer", "", ("paperscale",), ALL | {"planning"}),
    "folder": Entry("folder, torch DataLoader", "folder", "Peer", "common", (), IMAGES_ONLY, "resumed by skipping"),
    "memmap": Entry("memmap, torch DataLoader", "folder", "Peer", "common", (), TOKENS_ONLY, "resumed by skipping"),
    "get-batch": Entry(
        "memmap, get_batch", "folder", "GetBatch", "common", (), frozenset({"tokens"}), "draws with replacement"
    ),
    "torchdata": Entry("torchdata StatefulDataLoader", "torchdata", "Peer", "common", ("torchdata",), ALL),
    "webdataset": Entry("WebDataset", "wds", "Peer", "common", ("webdataset",), ALL, "resumed by skipping"),
    "litdata": Entry("LitData", "litdata", "Peer", "common", ("litdata",), ALL),
    "mds": Entry("MosaicML Streaming", "mds", "Peer", "streaming", ("mosaicml-streaming",), ALL | {"planning"}),
    "energon": Entry("Megatron-Energon", "energon", "Peer", "common", ("megatron-energon",), ALL),
    "hf-arrow": Entry("HF datasets, Arrow map", "huggingface", "Peer", "common", ("datasets", "torchdata"), ALL),
    "hf-parquet": Entry(
        "HF datasets, Parquet streaming", "huggingface", "Parquet", "common", ("datasets", "torchdata"), ALL
    ),
    "ffcv": Entry(
        "FFCV",
        "ffcv",
        "Peer",
        "ffcv",
        ("ffcv",),
        frozenset({"tokens", "decode", "memory", "shuffle"}),
        "JPEG encoded again at quality 94, area filter instead of antialiased bilinear",
    ),
}

_DECODERS = ("simplejpeg==1.9.0", "opencv-python-headless==5.0.0.93", "pillow", "torchvision")
ENVIRONMENTS = {
    "common": (
        "webdataset==1.0.2",
        "litdata==0.2.76",
        "megatron-energon==7.4.1",
        "datasets==5.0.1",
        "torchdata==0.11.0",
        *_DECODERS,
    ),
    "streaming": ("mosaicml-streaming==0.13.0", *_DECODERS),  # wants numpy<2.2 and transformers<5
    "ffcv": ("setuptools", "ffcv==1.0.2", "pillow"),
}
NEEDS = {"ffcv": "a C++ compiler, pkg-config and the development files of OpenCV and libjpeg-turbo"}
"""What pip cannot bring."""
