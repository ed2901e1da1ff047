"""GPT and GPT-2: language models that are trained on text and then asked.

Radford, Narasimhan, Salimans, Sutskever 2018, Improving Language Understanding by Generative Pre-Training ("GPT-1");
Radford, Wu, Child, Luan, Amodei, Sutskever 2019, Language Models are Unsupervised Multitask Learners ("GPT-2").

=================================================  ============================================================
In the papers                                      Here
=================================================  ============================================================
L_1, the likelihood of text (GPT-1, equation 1)    ``Gpt.forward``: cross-entropies of the tokens that follow
h_0 = U W_e + W_p (GPT-1, equation 2)              ``Gpt.hidden``: ``token`` and ``position``
transformer_block (equation 2; Vaswani et al.)     ``Block``: masked self-attention and a feed-forward network
softmax(h_n W_e^T) (equation 2)                    ``Gpt.vocabulary``: the token embeddings again
the 12-layer decoder (GPT-1, section 4.1)          ``Gpt1``
117M, 345M, 762M, 1542M (GPT-2, table 2)           ``Gpt2(size="small")``, ``"medium"``, ``"large"``, ``"xl"``
layer norms at the input, one after the last       ``pre_norm=True`` (GPT-2, section 2.3)
residual layers' weights scaled by 1/sqrt(N)       ``Gpt._draw``, N = 2L (GPT-2, section 2.3)
top-k random sampling (GPT-2, section 3.6)         ``Gpt.generate``, :mod:`paperscale.nn.sampling`
perplexity, bits per byte, BPC (GPT-2, table 3)    ``GptLanguageModel``: ``perplexity``, ``bits_per_byte``
=================================================  ============================================================

Departures, and why:

- GPT-2's table 2 counts 117M and 345M parameters; its authors have corrected that. The networks here have those of the
  released weights: 124,439,808 and 354,823,168.
- Query, key and value are three layers, in the released code one: the same numbers, and BERT's module.
- GPT-2's positions are drawn from N(0, 0.01), as in the released code; the paper does not say.
- The loss of a batch is the mean over its blocks of the mean over a block's targets. Where blocks are dense that is the
  mean over all targets; with ``data.segments`` it does not depend on how a global batch is divided over processes.
- AdamW with decay of matrices alone, as GPT-1 has it ("all non bias or gain weights"). GPT-2 does not tell how it was
  optimised; the recipe takes what is usual since.
- Text is generated past the network's positions: it then sees the last half of them, and goes on from there. The papers
  stop.
- Bits per byte are of the text as the set has it: the papers' de-tokenisers are not applied.

Shapes: T tokens of N sequences, H the hidden size, V the vocabulary, F the width of the feed-forward network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from paperscale.data.random import uniform
from paperscale.data.text import IGNORED
from paperscale.errors import UserError, nearest
from paperscale.nn.attention import Cache, Layout
from paperscale.nn.exchange import Names, Part
from paperscale.nn.losses import Entropies
from paperscale.nn.optimizers import decay_groups
from paperscale.nn.sampling import Sampling
from paperscale.nn.schedules import cosine, scheduled, warmed_up
from paperscale.nn.transformer import BitsPerByte, BitsPerToken, Perplexity, SelfAttention, Vocabulary

# -- the networks: GPT-1, sections 3.1 and 4.1; GPT-2, section 2.3 ---------------------------------------------


class Size(NamedTuple):
    """Layers, d_model and heads of GPT-2's table 2; heads are of width 64."""

    layers: int
    hidden: int
    heads: int


SIZES = {
    "small": Size(12, 768, 12),
    "medium": Size(24, 1024, 16),
    "large": Size(36, 1280, 20),
    "xl": Size(48, 1600, 25),
}
EPS = 1e-5
"""Of layer norms, as in the released code."""


class Block(nn.Module):
    """Masked self-attention and a feed-forward network, each added to its input.

    Args:
        hidden: H.
        heads: of the attention.
        dropout: of the attention's probabilities and of both outputs.
        pre_norm: normalise what each part sees (GPT-2); otherwise its sum with its input (GPT-1).
    """

    def __init__(self, hidden: int, heads: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.attention_norm = nn.LayerNorm(hidden, EPS)
        self.attention = SelfAttention(hidden, heads, dropout, causal=True)
        self.norm = nn.LayerNorm(hidden, EPS)
        self.inner = nn.Linear(hidden, 4 * hidden)
        self.outer = nn.Linear(4 * hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_TH: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """Return the block's output, shape [T, H]; ``cache`` is of the tokens before these, see :class:`Cache`."""
        if self.pre_norm:
            x_TH = x_TH + self.dropout(self.attention(self.attention_norm(x_TH), layout, cache))
            return x_TH + self.feed_forward(self.norm(x_TH))
        x_TH = self.attention_norm(x_TH + self.dropout(self.attention(x_TH, layout, cache)))
        return self.norm(x_TH + self.feed_forward(x_TH))

    def feed_forward(self, x_TH: Tensor) -> Tensor:
        """Return the output of the feed-forward network, shape [T, H]."""
        inner_TF = F.gelu(self.inner(x_TH), approximate="tanh")
        return self.dropout(self.outer(inner_TF))


class Gpt(nn.Module):
    """The network of both papers.

    Args:
        vocab_size: V.
        layers: L.
        hidden: H.
        heads: of each layer.
        positions: tokens that it sees at most.
        pre_norm: see :class:`Block`; with it there is one more layer norm after the last block.
        dropout: of embeddings, attention and outputs.
    """

    repeated = ("position.weight",)

    def __init__(
        self, vocab_size: int, layers: int, hidden: int, heads: int, positions: int, pre_norm: bool, dropout: float
    ):
        super().__init__()
        self.size, self.vocab_size, self.positions = Size(layers, hidden, heads), vocab_size, positions
        self.pre_norm, self.rate = pre_norm, dropout
        self.token = nn.Embedding(vocab_size, hidden)
        self.position = nn.Embedding(positions, hidden)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(hidden, heads, dropout, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden, EPS) if pre_norm else None
        self._draw()
        self.vocabulary = Vocabulary(self.token, bias=False)

    def _draw(self) -> None:
        """Draw the weights; with ``pre_norm`` those whose outputs are added up smaller, by the number of additions."""
        for name, part in self.named_modules():
            std = 0.02
            if self.pre_norm and name == "position":
                std = 0.01
            if self.pre_norm and name.endswith(("attention.output", "outer")):
                std = 0.02 / (2 * self.size.layers) ** 0.5
            if isinstance(part, (nn.Linear, nn.Embedding)):
                nn.init.normal_(part.weight, std=std)
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)

    def forward(self, batch: dict[str, Any]) -> Entropies:
        """Return the cross-entropy of each target; the loss is the mean over blocks of their mean.

        Args:
            batch: of :class:`paperscale.data.TokenBlocks`, with ``targets``.
        """
        target_T, counts_T = batch["targets"].flatten(), counted(batch["targets"])
        share_T = counts_T / counts_T.sum(1, keepdim=True).clamp(min=1) / len(counts_T)
        return self.vocabulary(self._read(batch), target_T.clamp(min=0), share_T.flatten())

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Return the logits of what follows each token of a batch's blocks, shape [T, V]."""
        return self.vocabulary(self._read(batch))

    def _read(self, batch: dict[str, Any]) -> Tensor:
        """Return the last layer's output of a batch of blocks, shape [T, H]."""
        blocks, length = batch["tokens"].shape
        device = batch["tokens"].device
        if "lengths" in batch:  # each document is a sequence
            position_T, layout = batch["position"].flatten(), Layout(batch["lengths"], batch["offsets"])
        else:
            position_T = torch.arange(length, device=device).repeat(blocks)
            offsets = torch.arange(0, blocks * length + 1, length, dtype=torch.int32, device=device)
            layout = Layout([length] * blocks, offsets)
        return self.hidden(batch["tokens"].flatten(), position_T, layout)

    def hidden(
        self, token_T: Tensor, position_T: Tensor, layout: Layout, caches: Sequence[Cache] | None = None
    ) -> Tensor:
        """Return h_n of each token (GPT-1, equation 2), normalised with ``pre_norm``, shape [T, H].

        Args:
            token_T: of all sequences.
            position_T: the place of each in its sequence.
            layout: where the sequences lie.
            caches: one for each block, of the tokens before these.

        Raises:
            UserError: a sequence is longer than the network's positions.
        """
        if layout.longest > self.positions:
            raise UserError(
                f"a block of {layout.longest} tokens, and model.network.positions={self.positions}: shorten "
                "data.length, or raise model.network.positions"
            )
        x_TH = self.dropout(self.token(token_T) + self.position(position_T))
        for number, block in enumerate(self.blocks):
            x_TH = block(x_TH, layout, None if caches is None else caches[number])
        return x_TH if self.norm is None else self.norm(x_TH)

    # -- generation: GPT-2, section 3.6 and appendix ---------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int = 100,
        sampling: Sampling | None = None,
        end: int | None = None,
        cached: bool = True,
    ) -> list[list[int]]:
        """Return what follows each prompt; dropout is off.

        What is drawn is a function of seed, prompt and its number: other prompts beside it change nothing.

        Args:
            prompts: tokens of each, of any lengths.
            tokens: of each continuation at most.
            sampling: how tokens are drawn; by default from all of them as they are.
            end: token that ends a text; it is part of what is returned.
            cached: keep each layer's keys and values; without it everything is computed again for each token.

        Raises:
            UserError: a prompt is empty, or has a token that the network has not.
        """
        for prompt in prompts:
            if not len(prompt) or not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens, the largest {max(prompt, default=None)}, and a vocabulary of "
                    f"{self.vocab_size}: give at least one token, and use the tokenizer of the network's own data"
                )
        sampling, training = sampling or Sampling(), self.training
        reader = _Reader(self.eval(), min(self.positions, max(map(len, prompts), default=0) + tokens), cached)
        texts, ended = [list(prompt) for prompt in prompts], torch.zeros(len(prompts), dtype=torch.bool)
        sequence_N1, token_V = np.arange(len(texts))[:, None], np.arange(self.vocab_size)
        for step in range(tokens if texts else 0):
            number_NV = torch.from_numpy(uniform(sampling.seed, sequence_N1, step, token_V))
            token_N = sampling.draw(reader.next_logits(texts).cpu(), number_NV)
            for text, token in zip(texts, token_N.tolist(), strict=True):
                text.append(token)
            ended |= token_N == (-1 if end is None else end)
            if ended.all():
                break
        self.train(training)
        return [_up_to(text[len(prompt) :], end) for text, prompt in zip(texts, prompts, strict=True)]

    def first_seen(self, length: int) -> int:
        """Return the first token that is seen of a text of ``length``: 0 until the positions are used up.

        Then half of them are given up at a time, so that most tokens are read once.
        """
        step = self.positions - self.positions // 2
        return max(0, -(-(length - self.positions) // step) * step)

    # -- the released weights --------------------------------------------------------------------------------

    def huggingface_names(self) -> dict[str, str | Part]:
        """Return this network's names to those of transformers' ``GPT2LMHeadModel`` or ``OpenAIGPTLMHeadModel``.

        Their weights of layers are transposed, and query, key and value are one layer.
        """
        tops = {"token": "wte", "position": "wpe", "norm": "ln_f"} if self.pre_norm else {}
        tops = tops or {"token": "tokens_embed", "position": "positions_embed"}
        layers = {"attention.output": "attn.c_proj", "inner": "mlp.c_fc", "outer": "mlp.c_proj"}
        norms = {"attention_norm": "ln_1", "norm": "ln_2"}
        fused = {f"attention.{name}": number for number, name in enumerate(("query", "key", "value"))}
        names: dict[str, str | Part] = {}
        for full, _ in self.named_parameters():
            top, _, rest = full.partition(".")
            if top != "blocks":
                names[full] = f"transformer.{tops[top]}.{rest}"
                continue
            number, _, inner = rest.partition(".")
            part, _, kind = inner.rpartition(".")
            theirs = f"transformer.h.{number}."
            if part in norms:
                names[full] = f"{theirs}{norms[part]}.{kind}"
            elif part in layers:
                names[full] = Part(f"{theirs}{layers[part]}.{kind}", transposed=kind == "weight")
            else:
                names[full] = Part(f"{theirs}attn.c_attn.{kind}", fused[part], 3, transposed=kind == "weight")
        return names

    def huggingface_config(self) -> dict[str, Any]:
        """Return the content of ``config.json``."""
        own = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
        if not self.pre_norm:
            own = {"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"], "afn": "gelu"}
        layers, hidden, heads = self.size
        sizes = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "n_positions": self.positions}
        rates = {f"{part}_pdrop": self.rate for part in ("embd", "attn", "resid")}
        return {**own, "vocab_size": self.vocab_size, **sizes, **rates, "layer_norm_epsilon": EPS, **_ENDS}


_ENDS = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}
"""Which token ends a text, the set's tokenizer knows; the library would take its own."""


def counted(target: Tensor) -> Tensor:
    """Return which targets there are: not behind a document's last token."""
    return target != IGNORED


def _up_to(text: list[int], end: int | None) -> list[int]:
    """Return a text up to its end, which is part of it."""
    return text[: text.index(end) + 1] if end in text else text


class _Reader:
    """Reads texts that grow, and keeps what it has seen of them.

    Args:
        network: that reads.
        size: tokens that it will see of a text at most.
        cached: whether to keep it.
    """

    def __init__(self, network: Gpt, size: int, cached: bool):
        self.network, self.size, self.cached = network, size, cached
        self.starts: list[int] = []
        self.caches: list[Cache] | None = None

    def next_logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits of what follows each text, shape [N, V]; since the last call each has one more token."""
        starts = [self.network.first_seen(len(text)) for text in texts]
        if self.cached and starts == self.starts:
            unread = [len(text) - 1 for text in texts]
        else:
            self.caches = [Cache(self.size) for _ in self.network.blocks] if self.cached else None
            self.starts = unread = starts
        device = self.network.token.weight.device
        lengths = [len(text) - first for text, first in zip(texts, unread, strict=True)]
        token_T = [token for text, first in zip(texts, unread, strict=True) for token in text[first:]]
        position_T = [
            place - start
            for text, first, start in zip(texts, unread, starts, strict=True)
            for place in range(first, len(text))
        ]
        layout = Layout(lengths, torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device))
        tokens, positions = (torch.tensor(values, device=device) for values in (token_T, position_T))
        hidden_TH = self.network.hidden(tokens, positions, layout, self.caches)
        return self.network.vocabulary(hidden_TH[layout.last])


class Gpt1(Gpt):
    """The 12-layer decoder of GPT-1 (section 4.1): 116,534,784 parameters.

    Args:
        vocab_size: V; 40,000 merges and what they are made of.
        layers: L.
        hidden: H.
        heads: of each layer.
        positions: tokens that it sees at most.
        dropout: of embeddings, attention and outputs.
    """

    def __init__(
        self,
        vocab_size: int = 40478,
        layers: int = 12,
        hidden: int = 768,
        heads: int = 12,
        positions: int = 512,
        dropout: float = 0.1,
    ):
        super().__init__(vocab_size, layers, hidden, heads, positions, pre_norm=False, dropout=dropout)


class Gpt2(Gpt):
    """The networks of GPT-2's table 2: 124,439,808, 354,823,168, 774,030,080 and 1,557,611,200 parameters.

    Args:
        size: one of :data:`SIZES`.
        vocab_size: V.
        layers: L, by default the size's.
        hidden: H, by default the size's.
        heads: of each layer, by default the size's.
        positions: tokens that it sees at most.
        dropout: of embeddings, attention and outputs.

    Raises:
        UserError: there is no such size.
    """

    def __init__(
        self,
        size: str = "small",
        vocab_size: int = 50257,
        layers: int | None = None,
        hidden: int | None = None,
        heads: int | None = None,
        positions: int = 1024,
        dropout: float = 0.1,
    ):
        if size not in SIZES:
            raise UserError(f"network.size={size}: there are {', '.join(SIZES)}{nearest(size, SIZES)}")
        given = {"layers": layers, "hidden": hidden, "heads": heads}
        of = SIZES[size]._replace(**{name: value for name, value in given.items() if value is not None})
        super().__init__(vocab_size, *of, positions, pre_norm=True, dropout=dropout)


# -- training: GPT-1, sections 3.1 and 4.1 ---------------------------------------------------------------------


class GptLanguageModel(LightningModule):
    """Training by the likelihood of the next token (GPT-1, equation 1).

    Args:
        network: of either paper.
        lr: the highest learning rate.
        betas: of AdamW's averages.
        eps: of its denominator.
        weight_decay: of matrices; biases and layer norms have none.
        warmup: steps until ``lr`` is reached; below 1, a share of the training.
        least: the last learning rate, as a share of ``lr``; a cosine leads to it.

    Raises:
        UserError: the warm-up or the share is none.
    """

    def __init__(
        self,
        network: Gpt,
        lr: float = 2.5e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        warmup: float = 2000,
        least: float = 0.0,
    ):
        super().__init__()
        if warmup < 0:
            raise UserError(f"model.warmup={warmup}: give a number of steps, or a share of the training below 1")
        if not 0 <= least <= 1:
            raise UserError(f"model.least={least}: give the last learning rate as a share of lr, from 0 to 1")
        self.network = network
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.warmup, self.least = warmup, least
        self.bytes_V: Tensor | None = None
        for stage in ("val", "test"):
            setattr(self, f"{stage}_loss", MeanMetric())
            setattr(self, f"{stage}_perplexity", Perplexity())
            setattr(self, f"{stage}_bits_per_token", BitsPerToken())
            setattr(self, f"{stage}_bits_per_byte", BitsPerByte())

    def setup(self, stage: str) -> None:
        """Learn from the data's tokenizer how many bytes a token is; errors are those of :meth:`check_data`."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.check_data(data)
        sizes = data.tokenizer().sizes() if getattr(data, "has_tokenizer", False) else None
        self.bytes_V = None if sizes is None else torch.from_numpy(sizes)

    def check_data(self, data: Any) -> None:
        """Refuse data that does not fit the network.

        Raises:
            UserError: it has no targets, or more tokens or longer blocks than the network.
        """
        if not getattr(data, "next_token", True):
            raise UserError("data.next_token=false, and a language model needs the tokens that follow: set it to true")
        if (length := getattr(data, "length", 0)) > self.network.positions:
            raise UserError(
                f"data.length={length} and model.network.positions={self.network.positions}: set "
                f"data.length={self.network.positions} or model.network.positions={length}"
            )
        tokens = data.tokenizer().vocab_size if getattr(data, "has_tokenizer", False) else 0
        if tokens > self.network.vocab_size:
            raise UserError(
                f"the tokenizer at {data.paths[0]} has {tokens} tokens, and model.network.vocab_size="
                f"{self.network.vocab_size}: set model.network.vocab_size={tokens}"
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch."""
        loss = self.network(batch).loss
        self.log("train/loss", loss.detach())
        return loss

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        """Score one batch: the means are over all targets."""
        target_T, counts_T = batch["targets"].flatten(), counted(batch["targets"]).flatten()
        entropy_T = self.network(batch).entropy_M
        found: dict[str, tuple[Tensor, Tensor]] = dict.fromkeys(
            ("loss", "perplexity", "bits_per_token"), (entropy_T, counts_T.float())
        )
        if self.bytes_V is not None:
            bytes_T = self.bytes_V.to(target_T.device)[target_T.clamp(min=0)]
            found["bits_per_byte"] = (entropy_T * counts_T, bytes_T * counts_T)
        for name, values in found.items():
            metric = getattr(self, f"{stage}_{name}")
            metric.update(*values)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, batch_size=len(batch["targets"]))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch of the validation split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch of the test split."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and its schedule: linear warm-up, then a cosine (GPT-1, section 4.1)."""
        groups: Any = decay_groups(self, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=tuple(self.betas), eps=self.eps)  # type: ignore[arg-type]
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = int(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        return scheduled(optimizer, warmed_up(cosine(steps, warmup, self.least), warmup))  # type: ignore[return-value]

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """Return what follows each prompt, as tokens; the arguments are those of :meth:`Gpt.generate`."""
        return self.network.generate(prompts, **options)

    def export_names(self, format: str) -> Names:
        """Return this module's names to those of another library's network, empty where there is none."""
        if format != "huggingface":
            return {}
        return {f"network.{name}": other for name, other in self.network.huggingface_names().items()}

    def export_config(self, format: str) -> dict[str, Any]:
        """Return the content of ``config.json``."""
        return self.network.huggingface_config()
