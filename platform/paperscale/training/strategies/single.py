"""One process on one device."""

from __future__ import annotations

from lightning.pytorch.strategies import SingleDeviceStrategy

from paperscale.training.strategies.portable import PortableStrategy


class SingleStrategy(PortableStrategy, SingleDeviceStrategy):
    """Lightning's strategy for one device."""
