"""BERT on spans and on words: Devlin et al. 2019, sections 4.2, 4.3 and 5.3; the encoder is in :mod:`.bert`.

=========================================  =============================================================================
In the paper                               Here
=========================================  =============================================================================
SQuAD v1.1 (section 4.2)                   ``BertQuestions``; the data: :mod:`paperscale.data.questions`
S, E, score S·T_i + E·T_j                  ``SpanScores.output``: two vectors, no pooler; ``best_spans``
SQuAD v2.0, s_null, τ (section 4.3)        ``BertQuestions(no_answer=True)``, ``null_threshold``
BiLSTM of table 5                          ``BertQuestions(bilstm=True)``
named entities, fine-tuned (section 5.3)   ``BertTagger``; the data: :mod:`paperscale.data.tagged`
feature-based (section 5.3, table 7)       ``BertTagger(features=...)``, of ``FEATURES``
NER of table 8                             both, on an encoder of another ``data.mask_mix``
=========================================  =============================================================================

Departures, and why:

- The loss of questions is the mean over questions of the mean over a question's windows; in the original each window
  is an example of its own. It so does not depend on how a global batch is divided over processes, and a question about
  a long passage counts as one.
- The loss of words is their sum over a fixed number for each document, those that one has on average: as in the
  original all words count alike, and again nothing depends on how a batch is divided.
- Of a window's starts and ends the 20 best are taken among those that can be one; the original takes them among all
  tokens, and then those that can. An answer's text is taken from the passage by the tokens' characters.
- A weighted sum of layers has the weights of Peters et al. 2018, equation 1, which the paper does not give.

Shapes: Q questions, T tokens of N sequences, L tokens of the longest, H the hidden size, W words, K tags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperscale.data.questions import Asked
from paperscale.data.tagged import CONLL_2003
from paperscale.errors import UserError, nearest
from paperscale.nn.answers import AnswerScores
from paperscale.nn.attention import Layout
from paperscale.nn.entities import EntityF1
from paperscale.nn.transformer import truncated_normal
from paperscale.papers.bert import Bert, BertModule


class TokenLstm(nn.Module):
    """A randomly initialised BiLSTM over the tokens of each sequence.

    Args:
        width: of its input.
        hidden: of its states in each direction; the output has twice as many.
        layers: one upon the other.
    """

    def __init__(self, width: int, hidden: int, layers: int = 1):
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True, bidirectional=True)

    def forward(self, x_TH: Tensor, layout: Layout) -> Tensor:
        """Return both directions' states of each token, shape [T, 2 hidden]."""
        packed = nn.utils.rnn.pack_sequence(x_TH.split(layout.lengths), enforce_sorted=False)
        states_NLH, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        kept = [torch.arange(length) + row * layout.longest for row, length in enumerate(layout.lengths)]
        return states_NLH.flatten(0, 1)[torch.cat(kept).to(x_TH.device)]


class TaskModule(BertModule):
    """What tasks over tokens share: scores of whole validation and test splits, and names in another library.

    Args:
        optimizer: the arguments of :class:`~paperscale.papers.bert.BertModule`.
    """

    network: Any
    huggingface_class = ""
    huggingface_output = ""

    def scores(self, stage: str) -> Any:
        """Return the metric of ``val`` or ``test``."""
        return getattr(self, f"{stage}_scores")

    def evaluate(self, batch: dict[str, Any], stage: str) -> None:
        """Score one batch."""
        raise NotImplementedError

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch of the validation split."""
        self.evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch of the test split."""
        self.evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the validation split."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test split."""
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        found: Mapping[str, Tensor] = self.scores(stage).compute()
        self.scores(stage).reset()
        for name, value in found.items():
            self.log(f"{stage}/{name}", value.float())

    @property
    def _has_lstm(self) -> bool:
        return getattr(self.network, "lstm", None) is not None

    def export_names(self, format: str) -> dict[str, str]:
        """Return this module's names to transformers'; without its output where that follows a BiLSTM."""
        names = super().export_names(format)
        if names and not self._has_lstm:
            names |= {f"network.output.{kind}": f"{self.huggingface_output}.{kind}" for kind in ("weight", "bias")}
        return names

    def export_config(self, format: str) -> dict[str, Any]:
        """Return the content of ``config.json``, with the class of transformers' that has this output."""
        config = super().export_config(format)
        return config if self._has_lstm else {**config, "architectures": [self.huggingface_class]}


# -- sections 4.2 and 4.3: questions --------------------------------------------------------------------------


class SpanScores(nn.Module):
    """The encoder with S and E: how well each token begins an answer, and how well it ends one (figure 4, c).

    Args:
        bert: the encoder.
        bilstm: put a BiLSTM between (table 5).
    """

    def __init__(self, bert: Bert, bilstm: bool = False):
        super().__init__()
        self.bert = bert
        self.lstm = TokenLstm(bert.hidden, bert.hidden // 2) if bilstm else None
        self.output = nn.Linear(bert.hidden, 2)
        truncated_normal(self.output, 0.02)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return S·T_i and E·T_i of each sequence's tokens, shape [2, N, L]; behind its end they are -inf."""
        layout = Layout(batch["lengths"], batch["offsets"])
        hidden_TH = self.bert(batch, layout)
        if self.lstm is not None:
            hidden_TH = self.lstm(hidden_TH, layout)
        return padded(self.output(hidden_TH).T, layout, -torch.inf)


def padded(x_XT: Tensor, layout: Layout, fill: float | bool) -> Tensor:
    """Return what is known of packed tokens by sequence, shape [..., N, L], with ``fill`` behind each one's end."""
    at_L = torch.arange(layout.longest, device=x_XT.device)
    place_NL = (layout.first[:, None] + at_L).clamp(max=x_XT.shape[-1] - 1)
    return x_XT[..., place_NL].masked_fill(at_L >= layout.offsets.diff()[:, None], fill)


class Spans(NamedTuple):
    """The best span of each sequence.

    Attributes:
        score_N: S·T_i + E·T_j; -inf where there is none.
        first_N: i, from the sequence's ``[CLS]``.
        last_N: j.
    """

    score_N: Tensor
    first_N: Tensor
    last_N: Tensor


def best_spans(score_2NL: Tensor, first_NL: Tensor, last_NL: Tensor, n_best: int, longest: int) -> Spans:
    """Return the best span of each sequence, among the ``n_best`` best starts and ends.

    Args:
        score_2NL: S·T_i and E·T_i.
        first_NL: which tokens may begin a span, bool.
        last_NL: which may end it.
        n_best: starts, and ends, that are tried with each other.
        longest: tokens of a span at most.
    """
    places = min(n_best, score_2NL.shape[-1])
    allowed_2NL = torch.stack([first_NL, last_NL])
    best_2NB, at_2NB = score_2NL.float().masked_fill(~allowed_2NL, -torch.inf).topk(places, dim=2)
    tokens_NBB = at_2NB[1][:, None, :] - at_2NB[0][:, :, None] + 1
    score_NBB = best_2NB[0][:, :, None] + best_2NB[1][:, None, :]
    score_NBB = score_NBB.masked_fill((tokens_NBB < 1) | (tokens_NBB > longest), -torch.inf)
    score_N, pair_N = score_NBB.flatten(1).max(dim=1)
    row_N = torch.arange(len(pair_N), device=pair_N.device)
    return Spans(score_N, at_2NB[0][row_N, pair_N // places], at_2NB[1][row_N, pair_N % places])


class Answer(NamedTuple):
    """What is found for a question.

    Attributes:
        text: of the best span over all windows; empty where there is none.
        difference: the score of having no answer, the least over the windows, less the best span's.
    """

    text: str
    difference: float


class BertQuestions(TaskModule):
    """Answers to questions, as spans of a passage: the cross-entropies of start and end, averaged.

    The score of having no answer is S·C + E·C, the least over a question's windows. With ``no_answer`` an answer is
    given unless that exceeds the best span's score by more than ``null_threshold``, τ of section 4.3; which threshold
    would have been the best for the split is logged as ``best_f1_threshold`` and ``best_exact_match_threshold``.

    Args:
        network: the encoder; its weights come by ``init_from``.
        no_answer: whether there are questions without an answer: SQuAD v2.0, and its way to count.
        null_threshold: τ.
        n_best: starts and ends that are tried with each other.
        longest_answer: tokens of an answer at most.
        bilstm: put a BiLSTM on the encoder (table 5).
        optimizer: the further arguments of :class:`~paperscale.papers.bert.BertModule`.

    Raises:
        UserError: a number is less than 1.
    """

    huggingface_class, huggingface_output = "BertForQuestionAnswering", "qa_outputs"

    def __init__(
        self,
        network: Bert,
        no_answer: bool = False,
        null_threshold: float = 0.0,
        n_best: int = 20,
        longest_answer: int = 30,
        bilstm: bool = False,
        **optimizer: Any,
    ):
        super().__init__(**optimizer)
        for name, value in {"n_best": n_best, "longest_answer": longest_answer}.items():
            if value < 1:
                raise UserError(f"model.{name}={value}: give 1 or more")
        self.network = SpanScores(network, bilstm)
        self.no_answer, self.null_threshold = no_answer, null_threshold
        self.n_best, self.longest_answer = n_best, longest_answer
        for stage in ("val", "test"):
            setattr(self, f"{stage}_scores", AnswerScores(no_answer, null_threshold))

    def loss(self, score_2NL: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return the mean over questions of the mean over their windows."""
        start_N, end_N = (
            F.cross_entropy(score_NL.float(), target_N, reduction="none")
            for score_NL, target_N in zip(score_2NL, batch["answer"].T, strict=True)
        )
        return ((start_N + end_N) / 2 * batch["share"]).sum() / len(batch["asked"])

    def answers(self, score_2NL: Tensor, batch: dict[str, Any]) -> list[Answer]:
        """Return the answer to each question of a batch."""
        layout = Layout(batch["lengths"], batch["offsets"])
        first_NL, last_NL = (padded(batch[name], layout, False) for name in ("widest", "passage"))
        found = best_spans(score_2NL, first_NL, last_NL, self.n_best, self.longest_answer)
        null_N = score_2NL[:, :, 0].float().sum(0)
        rows = torch.stack([found.score_N, null_N, found.first_N, found.last_N], dim=1).double().tolist()
        return [_answer(batch["asked"], question, rows) for question in range(len(batch["asked"]))]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch."""
        loss = self.loss(self.network(batch), batch)
        self.log("train/loss", loss.detach())
        return loss

    def evaluate(self, batch: dict[str, Any], stage: str) -> None:
        """Score one batch."""
        score_2NL, asked = self.network(batch), batch["asked"]
        self.log(f"{stage}/loss", self.loss(score_2NL, batch), on_epoch=True, batch_size=len(asked))
        found = self.answers(score_2NL, batch)
        self.scores(stage).update([one.text for one in found], asked.answers, [one.difference for one in found])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, str]:
        """Return the answer to each question, by its id: what the official scripts read."""
        found = self.answers(self.network(batch), batch)
        given = ["" if self.no_answer and answer.difference > self.null_threshold else answer.text for answer in found]
        return dict(zip(batch["asked"].ids, given, strict=True))


def _answer(asked: Asked, question: int, rows: Sequence[Sequence[float]]) -> Answer:
    """Return the best answer over a question's windows.

    Args:
        asked: the questions.
        question: its number.
        rows: score of the best span, score of none, first and last token, of each window.
    """
    numbers = range(asked.first_window[question], asked.first_window[question + 1])
    window = max(numbers, key=lambda number: rows[number][0])
    score, _, first, last = rows[window]
    null = min(rows[number][1] for number in numbers)
    if score == -torch.inf:
        return Answer("", torch.inf)
    return Answer(asked.text(question, window, int(first), int(last)), null - score)


# -- section 5.3: words ---------------------------------------------------------------------------------------


class WordTags(nn.Module):
    """The encoder with a layer over each word's first token (figure 4, d); no tag depends on another.

    Args:
        bert: the encoder.
        tags: K.
        dropout: of the layer's input.
    """

    def __init__(self, bert: Bert, tags: int, dropout: float = 0.1):
        super().__init__()
        self.bert = bert
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(bert.hidden, tags)
        truncated_normal(self.output, 0.02)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return the logits of each word's tags, shape [W, K]."""
        hidden_TH = self.bert(batch, Layout(batch["lengths"], batch["offsets"]))
        return self.output(self.dropout(hidden_TH[batch["places"]]))


class Features(NamedTuple):
    """What a row of table 7 takes from the encoder.

    Attributes:
        layers: which of its L + 1 outputs, the embeddings first.
        together: ``weighted``: their weighted sum; ``concat``: one beside the other.
    """

    layers: slice
    together: str = "concat"


FEATURES = {
    "embeddings": Features(slice(0, 1)),
    "second-to-last": Features(slice(-2, -1)),
    "last": Features(slice(-1, None)),
    "weighted-last-4": Features(slice(-4, None), "weighted"),
    "concat-last-4": Features(slice(-4, None)),
    "weighted-all": Features(slice(1, None), "weighted"),
}
"""Rows of table 7."""


class FeatureTags(nn.Module):
    """A BiLSTM over what an encoder that is not trained makes of the tokens (section 5.3, feature-based).

    Args:
        bert: the encoder; its parameters are given no gradient, and it drops nothing.
        tags: K.
        features: one of :data:`FEATURES`.
        width: units of the BiLSTM in each direction.
        dropout: of the output layer's input.

    Raises:
        UserError: there are no such features, or the encoder has too few layers for them.
    """

    def __init__(self, bert: Bert, tags: int, features: str, width: int = 768, dropout: float = 0.1):
        super().__init__()
        if features not in FEATURES:
            raise UserError(f"model.features={features}: there are {', '.join(FEATURES)}{nearest(features, FEATURES)}")
        if features.endswith("-4") and bert.size.layers < 4:
            raise UserError(f"model.features={features}: the encoder has {bert.size.layers} layers; choose another")
        self.bert = bert.requires_grad_(False)
        self.layers, together = FEATURES[features]
        taken = len(range(bert.size.layers + 1)[self.layers])
        weighted = together == "weighted"
        self.weight = nn.Parameter(torch.zeros(taken)) if weighted else None
        self.scale = nn.Parameter(torch.ones(1)) if weighted else None
        self.lstm = TokenLstm(bert.hidden * (1 if weighted else taken), width, layers=2)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(2 * width, tags)
        truncated_normal(self.output, 0.02)

    def train(self, mode: bool = True) -> FeatureTags:
        """Set the mode of what is trained."""
        super().train(mode)
        self.bert.eval()
        return self

    def features(self, batch: dict[str, Any], layout: Layout) -> Tensor:
        """Return what the BiLSTM reads of each token, shape [T, its width]."""
        with torch.no_grad():
            outputs = self.bert.every_layer(batch, layout)[self.layers]
        if self.weight is None or self.scale is None:
            return torch.cat(outputs, dim=1)
        return self.scale * torch.einsum("l,lth->th", self.weight.softmax(0), torch.stack(outputs))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return the logits of each word's tags, shape [W, K]."""
        layout = Layout(batch["lengths"], batch["offsets"])
        states_TH = self.lstm(self.features(batch, layout), layout)
        return self.output(self.dropout(states_TH[batch["places"]]))


class BertTagger(TaskModule):
    """Tags of words: the mean cross-entropy.

    Args:
        network: the encoder; its weights come by ``init_from``.
        tags: the tags of the set, by their numbers.
        features: leave the encoder as it is, and take these of :data:`FEATURES`; by default all is fine-tuned.
        width: units of the BiLSTM over features, in each direction.
        dropout: of the output layer's input.
        words: of a document on average, by which the sum over its words is divided; 203,621 / 946 in CoNLL-2003.
        optimizer: the further arguments of :class:`~paperscale.papers.bert.BertModule`.
    """

    huggingface_class, huggingface_output = "BertForTokenClassification", "classifier"

    def __init__(
        self,
        network: Bert,
        tags: Sequence[str] = CONLL_2003,
        features: str | None = None,
        width: int = 768,
        dropout: float = 0.1,
        words: float = 215.0,
        **optimizer: Any,
    ):
        super().__init__(**optimizer)
        if words <= 0:
            raise UserError(f"model.words={words}: give the words that a document has on average, such as 215")
        self.tags, self.words = list(tags), words
        self.network = (
            WordTags(network, len(self.tags), dropout)
            if features is None
            else FeatureTags(network, len(self.tags), features, width, dropout)
        )
        for stage in ("val", "test"):
            setattr(self, f"{stage}_scores", EntityF1(self.tags))

    def check_data(self, data: Any) -> None:
        """Refuse data that does not fit the network.

        Args:
            data: the DataModule.

        Raises:
            UserError: it has other tags, or tokens that the network has no embeddings for.
        """
        super().check_data(data)
        classes = data.shards("train").manifest.classes
        if classes != self.tags:
            raise UserError(
                f"{data.paths[0]} has the tags {', '.join(classes)}, and model.tags is {', '.join(self.tags)}: set "
                f"'model.tags=[{','.join(classes)}]'"
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch."""
        sum_ = F.cross_entropy(self.network(batch).float(), batch["tag"], reduction="sum")
        loss = sum_ / self.words / len(batch["documents"])
        self.log("train/loss", loss.detach())
        return loss

    def evaluate(self, batch: dict[str, Any], stage: str) -> None:
        """Score one batch."""
        output_WK, tag_W = self.network(batch), batch["tag"]
        loss = F.cross_entropy(output_WK.float(), tag_W, reduction="sum") / max(1, len(tag_W))
        self.log(f"{stage}/loss", loss, on_epoch=True, batch_size=len(tag_W))
        self.scores(stage).update(output_WK.argmax(dim=1), tag_W, batch["first"])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list[list[str]]]:
        """Return the tags of each document's sentences, by its id."""
        numbers = self.network(batch).argmax(dim=1).tolist()
        return batch["documents"].divided([self.tags[number] for number in numbers])
