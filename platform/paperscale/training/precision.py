"""What Lightning's names of precisions stand for."""

from __future__ import annotations

import torch

MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
"""Types that are computed in, of weights in 32 bits."""
TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
"""Types of the weights themselves, where they are not 32 bits."""
