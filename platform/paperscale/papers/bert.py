"""BERT: Devlin, Chang, Lee, Toutanova 2019, https://arxiv.org/abs/1810.04805.

============================================  ====================================================================
In the paper                                  Here
============================================  ====================================================================
BERT-base, BERT-large (section 3)             ``Bert(size="base")``, ``"large"``; ``SIZES`` has those of the smaller
                                              models that were published later
input representation (figure 2)               ``Embeddings``: token + segment + position, then layer norm and dropout
Transformer encoder (Vaswani et al. 2017)     ``Layer``: post-norm, GELU
[CLS], C                                      ``Pooler``: tanh layer over a sequence's first token
masked LM (section 3.1, task 1)               ``PretrainingHeads.places``, only where something is masked
next sentence prediction (task 2)             ``PretrainingHeads.pair``, 1 where B is not the next
pre-training (section 3.1, A.2)               ``BertPretraining``; the data: :mod:`paperscale.data.pairs`
fine-tuning (section 4, figure 4)             ``BertClassifier`` and what follows it
left-to-right, LTR (section 5.1)              ``Bert(causal=True)`` with ``data.objective=left-to-right``
============================================  ====================================================================

Departures, and why:

- Sequences are packed, not padded: a batch is the T tokens of N sequences, one after the other, and none sees another.
  Every number is that of the padded computation; what is saved is the padding.
- The loss of a batch is the mean over its sequences of the mean over a sequence's masked tokens; the original takes the
  mean over all masked tokens of a batch. For sequences of one length it is the same, and this one does not depend on
  how a global batch is divided over processes.
- A span of text is a sample, its pairing and masking are drawn anew in each epoch; of a pair whose B is random, the
  original puts the unused rest of the span back (``data.duplicates=10`` repeats ten of them, as it does).
- AdamW corrects the bias of its averages; ``optimizer=bert_adam`` is the original's without (SPECS: it makes the
  fine-tuning of small sets unstable).

Shapes: T tokens of N sequences, H the hidden size, V the vocabulary, M masked tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassMatthewsCorrCoef

from paperscale.errors import UserError, nearest
from paperscale.nn.attention import Layout
from paperscale.nn.losses import Entropies
from paperscale.nn.optimizers import BertAdam, Lamb, decay_groups
from paperscale.nn.schedules import polynomial, scheduled, warmed_up
from paperscale.nn.transformer import Perplexity, SelfAttention, Vocabulary, truncated_normal

# -- section 3: the model -----------------------------------------------------------------------------------


class Size(NamedTuple):
    """L, H and A of section 3."""

    layers: int
    hidden: int
    heads: int


SIZES = {
    "tiny": Size(2, 128, 2),
    "mini": Size(4, 256, 4),
    "small": Size(4, 512, 8),
    "medium": Size(8, 512, 8),
    "base": Size(12, 768, 12),
    "large": Size(24, 1024, 16),
}
"""Base and large of the paper; the smaller ones of Turc et al. 2019, https://arxiv.org/abs/1908.08962."""
EPS = 1e-12
"""Of layer norms, as in the original code."""


class Embeddings(nn.Module):
    """The sum of token, segment and position embeddings (figure 2), normalised.

    Args:
        vocab_size: V.
        hidden: H.
        positions: tokens of a sequence at most.
        dropout: of the sum.
    """

    repeated = ("position.weight",)

    def __init__(self, vocab_size: int, hidden: int, positions: int, dropout: float):
        super().__init__()
        self.token = nn.Embedding(vocab_size, hidden)
        self.segment = nn.Embedding(2, hidden)
        self.position = nn.Embedding(positions, hidden)
        self.norm = nn.LayerNorm(hidden, EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, token_T: Tensor, segment_T: Tensor, position_T: Tensor) -> Tensor:
        """Return E, shape [T, H]."""
        sum_TH = self.token(token_T) + self.segment(segment_T) + self.position(position_T)
        return self.dropout(self.norm(sum_TH))


class Layer(nn.Module):
    """A layer of the encoder: self-attention and a feed-forward network, each added to its input and normalised.

    Args:
        hidden: H.
        heads: A.
        inner: width of the feed-forward network.
        dropout: of both outputs.
        attention_dropout: of the attention's probabilities.
        causal: whether a token sees those before it and itself alone.
    """

    def __init__(
        self, hidden: int, heads: int, inner: int, dropout: float, attention_dropout: float, causal: bool = False
    ):
        super().__init__()
        self.attention = SelfAttention(hidden, heads, attention_dropout, causal)
        self.attention_norm = nn.LayerNorm(hidden, EPS)
        self.inner = nn.Linear(hidden, inner)
        self.outer = nn.Linear(inner, hidden)
        self.norm = nn.LayerNorm(hidden, EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_TH: Tensor, layout: Layout) -> Tensor:
        """Return the layer's output, shape [T, H]."""
        x_TH = self.attention_norm(x_TH + self.dropout(self.attention(x_TH, layout)))
        inner_TF = F.gelu(self.inner(x_TH))  # x Phi(x), with the error function
        return self.norm(x_TH + self.dropout(self.outer(inner_TF)))


class Bert(nn.Module):
    """The encoder.

    Args:
        size: one of :data:`SIZES`.
        vocab_size: V; 30,522 in the uncased models, 28,996 in the cased.
        layers: L, by default the size's.
        hidden: H, by default the size's.
        heads: A, by default the size's.
        positions: tokens of a sequence at most.
        dropout: of embeddings and outputs.
        attention_dropout: of the attention's probabilities.
        causal: a token sees those before it and itself alone (section 5.1, LTR).

    Raises:
        UserError: there is no such size.
    """

    def __init__(
        self,
        size: str = "base",
        vocab_size: int = 30522,
        layers: int | None = None,
        hidden: int | None = None,
        heads: int | None = None,
        positions: int = 512,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        causal: bool = False,
    ):
        super().__init__()
        if size not in SIZES:
            raise UserError(f"network.size={size}: there are {', '.join(SIZES)}{nearest(size, SIZES)}")
        given = {"layers": layers, "hidden": hidden, "heads": heads}
        of = SIZES[size]._replace(**{name: value for name, value in given.items() if value is not None})
        for name, value in {**of._asdict(), "vocab_size": vocab_size, "positions": positions}.items():
            if value < 1:
                raise UserError(f"model.network.{name} must be at least 1, not {value}")
        self.size, self.vocab_size, self.hidden, self.positions = of, vocab_size, of.hidden, positions
        self.dropout, self.attention_dropout, self.causal = dropout, attention_dropout, causal
        self.embeddings = Embeddings(vocab_size, of.hidden, positions, dropout)
        self.layers = nn.ModuleList(
            Layer(of.hidden, of.heads, 4 * of.hidden, dropout, attention_dropout, causal) for _ in range(of.layers)
        )
        truncated_normal(self, 0.02)

    def forward(self, batch: dict[str, Any], layout: Layout) -> Tensor:
        """Return the last layer's output of each token, shape [T, H].

        Args:
            batch: packed sequences, see :mod:`paperscale.data.packing`.
            layout: where they lie.
        """
        return self.every_layer(batch, layout)[-1]

    def every_layer(self, batch: dict[str, Any], layout: Layout) -> list[Tensor]:
        """Return the embeddings and each layer's output, L + 1 of shape [T, H]."""
        if layout.longest > self.positions:
            raise UserError(
                f"a sequence of {layout.longest} tokens, and network.positions={self.positions}: shorten data.length, "
                "or raise network.positions"
            )
        outputs = [self.embeddings(batch["tokens"], batch["segment"], batch["position"])]
        for layer in self.layers:
            outputs.append(layer(outputs[-1], layout))
        return outputs

    def training_flops(self, lengths: Sequence[int]) -> int:
        """Return the operations of a training step in the encoder, two for each multiply-add.

        Of a token, 6 for each weight of a product, and 12 L H S for attention over the S tokens of its sequence:
        forward and backward pass.

        Args:
            lengths: tokens of each sequence.
        """
        layers, hidden, _ = self.size
        attended = sum(length**2 for length in lengths)
        return 6 * 12 * layers * hidden**2 * sum(lengths) + 12 * layers * hidden * attended

    def huggingface_config(self) -> dict[str, Any]:
        """Return the content of ``config.json`` for transformers' BERT."""
        return {
            "model_type": "bert",
            "vocab_size": self.vocab_size,
            "hidden_size": self.size.hidden,
            "num_hidden_layers": self.size.layers,
            "num_attention_heads": self.size.heads,
            "intermediate_size": 4 * self.size.hidden,
            "hidden_act": "gelu",
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.attention_dropout,
            "max_position_embeddings": self.positions,
            "type_vocab_size": 2,
            "layer_norm_eps": EPS,
            "is_decoder": self.causal,  # which there means causal
        }


class Pooler(nn.Module):
    """C: a tanh layer over the first token of each sequence (of a left-to-right network, over the last).

    Args:
        hidden: H.
        causal: of the encoder.
    """

    def __init__(self, hidden: int, causal: bool = False):
        super().__init__()
        self.dense, self.causal = nn.Linear(hidden, hidden), causal
        truncated_normal(self, 0.02)

    def forward(self, hidden_TH: Tensor, layout: Layout) -> Tensor:
        """Return C of each sequence, shape [N, H]."""
        return torch.tanh(self.dense(hidden_TH[layout.last if self.causal else layout.first]))


# -- section 3.1: pre-training ------------------------------------------------------------------------------


class PretrainingHeads(nn.Module):
    """The encoder with what its pre-training tasks need.

    Args:
        bert: the encoder.
        pairs: whether there is next sentence prediction.
    """

    def __init__(self, bert: Bert, pairs: bool = True):
        super().__init__()
        self.bert = bert
        self.transform, self.norm = nn.Linear(bert.hidden, bert.hidden), nn.LayerNorm(bert.hidden, EPS)
        truncated_normal(self.transform, 0.02)
        self.places = Vocabulary(bert.embeddings.token)
        self.pooler = Pooler(bert.hidden, bert.causal) if pairs else None
        self.pair = nn.Linear(bert.hidden, 2) if pairs else None
        if self.pair is not None:
            truncated_normal(self.pair, 0.02)

    def forward(self, batch: dict[str, Any]) -> tuple[Entropies, Tensor | None]:
        """Return the cross-entropies at the masked places, and whether B follows A: logits [N, 2]."""
        layout = Layout(batch["lengths"], batch["offsets"])
        hidden_TH = self.bert(batch, layout)
        places = self.places(self.transformed(hidden_TH[batch["places"]]), batch["targets"], batch["share"])
        return places, self._pairs(hidden_TH, layout)

    def _pairs(self, hidden_TH: Tensor, layout: Layout) -> Tensor | None:
        return None if self.pair is None or self.pooler is None else self.pair(self.pooler(hidden_TH, layout))

    def transformed(self, hidden_MH: Tensor) -> Tensor:
        """Return what the output layer sees: dense, GELU, layer norm."""
        return self.norm(F.gelu(self.transform(hidden_MH)))

    def logits(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the logits of every token [T, V], and of the pairs [N, 2]."""
        layout = Layout(batch["lengths"], batch["offsets"])
        hidden_TH = self.bert(batch, layout)
        return self.places(self.transformed(hidden_TH)), self._pairs(hidden_TH, layout)


_HUGGINGFACE = {
    "bert.embeddings.token": "bert.embeddings.word_embeddings",
    "bert.embeddings.segment": "bert.embeddings.token_type_embeddings",
    "bert.embeddings.position": "bert.embeddings.position_embeddings",
    "bert.embeddings.norm": "bert.embeddings.LayerNorm",
    "pooler.dense": "bert.pooler.dense",
    "transform": "cls.predictions.transform.dense",
    "norm": "cls.predictions.transform.LayerNorm",
    "places": "cls.predictions",
    "pair": "cls.seq_relationship",
}
"""Parts of a network with an encoder to what transformers calls them."""
_HUGGINGFACE_LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "inner": "intermediate.dense",
    "outer": "output.dense",
    "norm": "output.LayerNorm",
}
"""Parts of a :class:`Layer`."""


def huggingface_names(network: nn.Module) -> dict[str, str]:
    """Return the names of a network's parameters to those of transformers' BERT; what it does not have is left out.

    Args:
        network: has the encoder as its ``bert``.
    """
    names = {}
    for name, _ in network.named_parameters():
        part, _, kind = name.rpartition(".")
        if part.startswith("bert.layers."):
            _, _, number, inside = part.split(".", 3)
            names[name] = f"bert.encoder.layer.{number}.{_HUGGINGFACE_LAYER[inside]}.{kind}"
        elif part in _HUGGINGFACE:
            names[name] = f"{_HUGGINGFACE[part]}.{kind}"
    return names


class BertModule(LightningModule):
    """What pre-training and fine-tuning share: the optimizer and its schedule.

    Args:
        lr: the highest learning rate.
        optimizer: ``adamw``; ``bert_adam``, without bias correction as in the original code; ``lamb`` for large
            batches.
        betas: of the averages.
        eps: of the denominator.
        weight_decay: of matrices; biases and layer norms have none.
        warmup: steps until ``lr`` is reached; below 1, a share of the training.
        power: of the decay to 0 over the training: 1 is linear.
        total_steps: of the schedule; by default those of the training.
        first_step: where in the schedule the training begins: a second phase goes on where the first has stopped.
        embeddings_lr: times ``lr``, with which the tokens' embeddings learn: trained ones are several times longer than
            drawn ones, and turn as much more slowly.

    Raises:
        UserError: a value is out of its range.
    """

    def __init__(
        self,
        lr: float = 1e-4,
        optimizer: Literal["adamw", "bert_adam", "lamb"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        warmup: float = 10_000,
        power: float = 1.0,
        total_steps: int | None = None,
        first_step: int = 0,
        embeddings_lr: float = 1.0,
    ):
        super().__init__()
        if warmup < 0 or (warmup > 1 and warmup % 1):
            raise UserError(f"model.warmup={warmup}: give a number of steps, or a share of the training below 1")
        least_0 = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "power": power, "embeddings_lr": embeddings_lr}
        for name, value in least_0.items():
            if value < 0:
                raise UserError(f"model.{name} must be at least 0, not {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"model.betas={list(betas)}: give two numbers from 0 to below 1, such as [0.9, 0.999]")
        self.lr, self.optimizer_name, self.betas, self.eps = lr, optimizer, betas, eps
        self.weight_decay, self.warmup, self.power = weight_decay, warmup, power
        self.total_steps, self.first_step, self.embeddings_lr = total_steps, first_step, embeddings_lr

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its schedule (A.2): linear warm-up, then decay."""
        groups: Any = self._embeddings_apart(decay_groups(self, self.weight_decay))
        options: dict[str, Any] = {"lr": self.lr, "betas": tuple(self.betas), "eps": self.eps}
        if self.optimizer_name == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, **options)
        elif self.optimizer_name == "lamb":
            optimizer = Lamb(groups, weight_decay=self.weight_decay, **options)
        else:
            optimizer = BertAdam(groups, **options)
        steps = self.total_steps or int(self.trainer.estimated_stepping_batches)
        warmup = int(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        factor = warmed_up(polynomial(steps, self.power), warmup)
        return scheduled(optimizer, lambda step: factor(step + self.first_step))  # type: ignore[return-value]

    def _embeddings_apart(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return groups of parameters with those of the tokens' embeddings apart, where they have their own rate."""
        if self.embeddings_lr == 1:
            return groups
        apart = {part.token.weight for part in self.modules() if isinstance(part, Embeddings)}
        found = []
        for group in groups:
            for own, lr in ((True, self.embeddings_lr * self.lr), (False, self.lr)):
                parameters = [parameter for parameter in group["params"] if (parameter in apart) == own]
                found += [{**group, "params": parameters, "lr": lr}] if parameters else []
        return found

    def export_names(self, format: str) -> dict[str, str]:
        """Return this module's names to those of another library's network, empty where there is none.

        Raises:
            UserError: the library has such networks, but none that computes the same.
        """
        network: Any = self.network
        if format != "huggingface" or not isinstance(getattr(network, "bert", None), Bert):
            return {}
        if network.bert.causal and isinstance(getattr(network, "pooler", None), Pooler):
            raise UserError("transformers' BERT pools the first token, with model.network.causal=true it is the last")
        return {f"network.{name}": other for name, other in huggingface_names(network).items()}

    def export_config(self, format: str) -> dict[str, Any]:
        """Return the content of ``config.json``, for the encoder alone."""
        network: Any = self.network
        return {"architectures": ["BertModel"], **network.bert.huggingface_config()}

    @property
    def bert(self) -> Bert:
        """Return the encoder, of an ensemble the first one's."""
        network: Any = self.network
        found: Bert = getattr(network, "networks", [network])[0].bert
        return found

    def training_flops(self, batch: dict[str, Any]) -> int:
        """Return the operations that a training step on a batch needs; a task's layer of few outputs is not counted."""
        return self.bert.training_flops(batch["lengths"])

    def setup(self, stage: str) -> None:
        """Refuse data that does not fit the network."""
        self.check_data(self.trainer.datamodule)  # type: ignore[attr-defined]

    def check_data(self, data: Any) -> None:
        """Refuse data whose tokens or places the network has no embeddings for.

        Args:
            data: the DataModule.

        Raises:
            UserError: names both sizes.
        """
        bert, longest = self.bert, getattr(data, "longest", 1)
        if longest > bert.positions:
            raise UserError(
                f"data.length={longest} and model.network.positions={bert.positions}: shorten data.length, or raise "
                "model.network.positions"
            )
        tokenizer = data.tokenizer() if hasattr(data, "tokenizer") else None
        if tokenizer is not None and tokenizer.vocab_size > bert.vocab_size:
            raise UserError(
                f"{tokenizer.name} has {tokenizer.vocab_size} tokens, and model.network.vocab_size={bert.vocab_size}: "
                f"set model.network.vocab_size={tokenizer.vocab_size}, or for weights that are trained already use the "
                "tokenizer that they were trained with"
            )


class BertPretraining(BertModule):
    """Masked LM and next sentence prediction: the loss is the sum of their means (A.2).

    Args:
        network: the encoder.
        pairs: whether there is next sentence prediction; ``False`` with ``data.next_sentence=none``.
        optimizer: the further arguments of :class:`BertModule`.
    """

    def __init__(self, network: Bert, pairs: bool = True, **optimizer: Any):
        super().__init__(**optimizer)
        self.network = PretrainingHeads(network, pairs)
        for stage in ("val", "test"):
            setattr(self, f"{stage}_mlm_loss", MeanMetric())
            setattr(self, f"{stage}_perplexity", Perplexity())
            setattr(self, f"{stage}_mlm_accuracy", MeanMetric())
            if pairs:
                setattr(self, f"{stage}_nsp_accuracy", MeanMetric())

    def check_data(self, data: Any) -> None:
        """Refuse data that does not fit the network.

        Args:
            data: the DataModule.

        Raises:
            UserError: it has pairs and the network no head for them, or the other way round; or a network that sees
                what follows is to predict it.
        """
        super().check_data(data)
        has_pairs = getattr(data, "next_sentence", "random") != "none"
        if has_pairs != (self.network.pair is not None):
            raise UserError(
                f"model.pairs={self.network.pair is not None} and data.next_sentence={data.next_sentence}: set "
                f"model.pairs={str(has_pairs).lower()}"
            )
        left_to_right = getattr(data, "objective", "masked") == "left-to-right"
        if left_to_right != self.bert.causal:
            raise UserError(
                f"data.objective={data.objective} and model.network.causal={self.bert.causal}: set "
                f"model.network.causal={str(left_to_right).lower()}, or data.objective="
                f"{'masked' if left_to_right else 'left-to-right'}"
            )

    def export_config(self, format: str) -> dict[str, Any]:
        """Return the content of ``config.json``, with the class of transformers' that has these heads."""
        without_pairs = "BertLMHeadModel" if self.bert.causal else "BertForMaskedLM"
        kind = without_pairs if self.network.pair is None else "BertForPreTraining"
        return {**super().export_config(format), "architectures": [kind]}

    def training_flops(self, batch: dict[str, Any]) -> int:
        """Return the operations that a training step on a batch needs: the output layer at the masked tokens alone."""
        hidden = self.bert.hidden
        pooled = 0 if self.network.pair is None else (hidden + 2) * len(batch["lengths"])
        heads = (hidden + self.bert.vocab_size) * len(batch["places"]) + pooled
        return super().training_flops(batch) + 6 * hidden * heads

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch."""
        sequences = len(batch["lengths"])
        places, pair_N2 = self.network(batch)
        loss = mlm = places.loss / sequences
        self.log("train/mlm_accuracy", places.hit_M.float().mean())
        if pair_N2 is not None:
            nsp = F.cross_entropy(pair_N2.float(), batch["label"])
            loss = mlm + nsp
            self.log("train/nsp_loss", nsp.detach())
        self.log("train/mlm_loss", mlm.detach())
        self.log("train/loss", loss.detach())
        return loss

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        """Score one batch: the means are over all masked tokens, and over all pairs."""
        sequences = len(batch["lengths"])
        places, pair_N2 = self.network(batch)
        loss = places.loss / sequences
        found = {"mlm_loss": places.entropy_M, "perplexity": places.entropy_M, "mlm_accuracy": places.hit_M.float()}
        if pair_N2 is not None:
            loss = loss + F.cross_entropy(pair_N2.float(), batch["label"])
            found["nsp_accuracy"] = (pair_N2.argmax(1) == batch["label"]).float()
        for name, values in found.items():
            metric = getattr(self, f"{stage}_{name}")
            metric.update(values)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, batch_size=sequences)
        self.log(f"{stage}/loss", loss, on_epoch=True, batch_size=sequences)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch of the validation split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch of the test split."""
        self._evaluate(batch, "test")


# -- section 4: fine-tuning ---------------------------------------------------------------------------------


class SequenceClassifier(nn.Module):
    """The encoder with a layer over C (figure 4, a and b).

    Args:
        bert: the encoder.
        outputs: K; 1 for a score.
        dropout: of C.
        bilstm: put a BiLSTM on the encoder, and the layer over its last states in place of C (section 5.1).
    """

    def __init__(self, bert: Bert, outputs: int, dropout: float = 0.1, bilstm: bool = False):
        super().__init__()
        self.bert = bert
        self.pooler = BiLstm(bert.hidden) if bilstm else Pooler(bert.hidden, bert.causal)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(bert.hidden, outputs)
        truncated_normal(self.output, 0.02)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return the outputs of each sequence, shape [N, K]."""
        return self.of_sequences(batch)

    def of_sequences(self, batch: dict[str, Any]) -> Tensor:
        """Return the outputs of each sequence, shape [N, K]."""
        layout = Layout(batch["lengths"], batch["offsets"])
        return self.output(self.dropout(self.pooler(self.bert(batch, layout), layout)))


class BiLstm(nn.Module):
    """A randomly initialised BiLSTM over the encoder's output (section 5.1): its last states stand for the sequence.

    Args:
        hidden: H; each direction has half of it.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.lstm = nn.LSTM(hidden, hidden // 2, batch_first=True, bidirectional=True)

    def forward(self, hidden_TH: Tensor, layout: Layout) -> Tensor:
        """Return both directions' last states, shape [N, H]."""
        packed = nn.utils.rnn.pack_sequence(hidden_TH.split(layout.lengths), enforce_sorted=False)
        _, (last_2NH, _) = self.lstm(packed)
        return torch.cat([last_2NH[0], last_2NH[1]], dim=1)


_METRICS: dict[str, Any] = {
    "accuracy": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "f1": lambda classes: BinaryF1Score(),
    "matthews": lambda classes: MulticlassMatthewsCorrCoef(classes),
    "pearson": lambda classes: PearsonCorrCoef(),
    "spearman": lambda classes: SpearmanCorrCoef(),
}
"""Metrics of GLUE (Wang et al. 2019, table 1): F1 for MRPC and QQP, Matthews for CoLA, correlations for STS-B."""


class BertClassifier(BertModule):
    """Classes or scores of sentences and pairs: cross-entropy, or the squared error of one score.

    Args:
        network: the encoder; its weights come by ``init_from``.
        classes: K; 1 for a score.
        metrics: of ``accuracy``, ``f1``, ``matthews``, ``pearson`` and ``spearman``.
        dropout: of C.
        bilstm: put a BiLSTM on the encoder (section 5.1).
        optimizer: the further arguments of :class:`BertModule`.

    Raises:
        UserError: a metric is unknown, or is not one of classes, or of scores.
    """

    def __init__(
        self,
        network: Bert,
        classes: int = 2,
        metrics: list[str] | None = None,
        dropout: float = 0.1,
        bilstm: bool = False,
        **optimizer: Any,
    ):
        super().__init__(**optimizer)
        scores = classes == 1
        self.classes, self.metrics = classes, metrics or (["pearson", "spearman"] if scores else ["accuracy"])
        for name in self.metrics:
            if name not in _METRICS:
                raise UserError(f"model.metrics: '{name}'; there are {', '.join(_METRICS)}{nearest(name, _METRICS)}")
            if scores != (name in ("pearson", "spearman")):
                kind = "scores, and there are classes" if not scores else "classes, and model.classes=1 means scores"
                raise UserError(f"model.metrics: {name} is a metric of {kind}; choose another")
        self.network = self.with_head(network, dropout, bilstm)
        for stage in ("val", "test"):
            for name in self.metrics:
                setattr(self, f"{stage}_{name}", _METRICS[name](classes))

    def with_head(self, bert: Bert, dropout: float, bilstm: bool) -> SequenceClassifier:
        """Return the encoder with the task's layer."""
        return SequenceClassifier(bert, self.classes, dropout, bilstm)

    def check_data(self, data: Any) -> None:
        """Refuse data that does not fit the network.

        Args:
            data: the DataModule.

        Raises:
            UserError: it has another number of classes.
        """
        super().check_data(data)
        for shards in data.source("train").sets:
            named = len(shards.manifest.classes)
            if named and named != self.classes:
                raise UserError(
                    f"{shards.path} has {named} classes, and model.classes={self.classes}: set it to {named}"
                )

    def loss(self, output_NK: Tensor, label_N: Tensor) -> Tensor:
        """Return the mean cross-entropy, or squared error."""
        if self.classes == 1:
            return F.mse_loss(output_NK[:, 0].float(), label_N.float())
        return F.cross_entropy(output_NK.float(), label_N)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch."""
        loss = self.loss(self.network(batch), batch["label"])
        self.log("train/loss", loss.detach())
        return loss

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        output_NK, label_N = self.network(batch), batch["label"]
        size = len(label_N)
        self.log(f"{stage}/loss", self.loss(output_NK, label_N), on_epoch=True, batch_size=size)
        found = output_NK[:, 0].float() if self.classes == 1 else output_NK.argmax(dim=1)
        for name in self.metrics:
            metric = getattr(self, f"{stage}_{name}")
            metric.update(found, label_N.float() if self.classes == 1 else label_N)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, batch_size=size)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch of the validation split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch of the test split."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the most likely class, or the score, of each sample."""
        output_NK = self.network(batch)
        return output_NK[:, 0].float() if self.classes == 1 else output_NK.argmax(dim=1)


class BertChoice(BertClassifier):
    """Which of C endings follows a context (section 4.4): a vector over C of each pair gives its score.

    Args:
        network: the encoder.
        choices: C.
        dropout: of C.
        optimizer: the further arguments of :class:`BertModule`.
    """

    def __init__(self, network: Bert, choices: int = 4, dropout: float = 0.1, **optimizer: Any):
        super().__init__(network, choices, dropout=dropout, **optimizer)

    def with_head(self, bert: Bert, dropout: float, bilstm: bool) -> SequenceClassifier:
        """Return the encoder with the task's layer."""
        return PairScores(bert, self.classes, dropout)


class PairScores(SequenceClassifier):
    """A score of each sequence, those of one sample beside each other.

    Args:
        bert: the encoder.
        choices: C.
        dropout: of the first token's output.
    """

    def __init__(self, bert: Bert, choices: int, dropout: float = 0.1):
        super().__init__(bert, 1, dropout)
        self.choices = choices

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return the scores, shape [N / C, C]."""
        return self.of_sequences(batch).view(-1, self.choices)
