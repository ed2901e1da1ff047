"""GPUs and what their vendor's data sheets say of them.

Rates are of dense products: data sheets of the later ones print twice as much, which is for matrices half of zeros.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from paperscale.errors import UserError, nearest


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        name: what it is called here.
        memory: bytes that a program can have, which is less than the data sheet's.
        bandwidth: bytes a second between memory and chip; 0 where it is not known.
        rates: operations a second, two for each multiply-add, by the type that is computed in: ``fp32``, ``tf32``,
            ``fp16``, ``bf16``. A type that it has no units for is missing.
    """

    name: str
    memory: int
    bandwidth: float = 0.0
    rates: tuple[tuple[str, float], ...] = ()

    def rate(self, *kinds: str) -> float:
        """Return the rate of the first of these types that it has units for; 0 where nothing is known."""
        known = dict(self.rates)
        return next((known[kind] for kind in kinds if kind in known), 0.0)


def _gpu(name: str, gib: float, gb_s: float, **tera: float) -> GPU:
    return GPU(name, int(gib * 2**30), gb_s * 1e9, tuple((kind, rate * 1e12) for kind, rate in tera.items()))


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("V100-16", 15.7, 900, fp32=15.7, fp16=125),
        _gpu("V100-32", 31.7, 900, fp32=15.7, fp16=125),
        _gpu("T4", 14.5, 320, fp32=8.1, fp16=65),
        _gpu("A100-40", 39.3, 1555, fp32=19.5, tf32=156, fp16=312, bf16=312),
        _gpu("A100-80", 79.1, 2039, fp32=19.5, tf32=156, fp16=312, bf16=312),
        _gpu("A30", 23.5, 933, fp32=10.3, tf32=82, fp16=165, bf16=165),
        _gpu("A40", 44.3, 696, fp32=37.4, tf32=74.8, fp16=149.7, bf16=149.7),
        _gpu("A10", 22.0, 600, fp32=31.2, tf32=62.5, fp16=125, bf16=125),
        _gpu("L4", 21.9, 300, fp32=30.3, tf32=60, fp16=121, bf16=121),
        _gpu("L40S", 44.3, 864, fp32=91.6, tf32=183, fp16=362, bf16=362),
        _gpu("RTX3090", 23.6, 936, fp32=35.6, tf32=35.6, fp16=71, bf16=71),
        _gpu("RTX4090", 23.5, 1008, fp32=82.6, tf32=82.6, fp16=165.2, bf16=165.2),
        _gpu("H100-80", 79.1, 3350, fp32=67, tf32=494.7, fp16=989.4, bf16=989.4),
        _gpu("H200", 139.7, 4800, fp32=67, tf32=494.7, fp16=989.4, bf16=989.4),
        _gpu("B200", 178.3, 8000, fp32=75, tf32=1125, fp16=2250, bf16=2250),
    )
}
"""Those with several forms are the SXM modules."""


def named(name: str) -> GPU:
    """Return the GPU of a name as in :data:`GPUS`, however it is spaced, or of a kind of which there is one memory.

    Raises:
        UserError: there is none; suggests the nearest.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]|nvidia|gb$", "", text.lower())

    known = {plain(key): gpu for key, gpu in GPUS.items()}
    alike = [key for key in GPUS if plain(key.partition("-")[0]) == plain(name)]
    if len(alike) == 1:
        return GPUS[alike[0]]
    if alike:
        raise UserError(f"--gpu {name}: say of which memory, {' or '.join(alike)}")
    if plain(name) not in known:
        raise UserError(f"--gpu {name}: known are {', '.join(GPUS)}{nearest(name, GPUS) or '; use one of these'}")
    return known[plain(name)]


def recognised(name: str, memory: int) -> GPU:
    """Return the GPU that a driver or a scheduler calls ``name``, with the memory that it has.

    Args:
        name: such as ``NVIDIA A100-SXM4-80GB`` or ``a100``.
        memory: bytes of it.

    Returns:
        Its rates are empty where it is none of :data:`GPUS`.
    """
    words = re.sub(r"(RTX)\W?", r"\1", name.upper())
    alike = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in re.split(r"[^A-Z0-9]+", words)]
    if not alike:
        return GPU(name, memory)
    return replace(min(alike, key=lambda gpu: abs(gpu.memory - memory)), memory=memory)
