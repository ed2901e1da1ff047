"""Sentences of English and kindred text, by rules: the same text always gives the same sentences.

A sentence ends after ``.``, ``!``, ``?`` or ``…``, and the quotes and brackets that close with it, where white space
and then an upper-case letter or a digit follow, also behind an opening quote or bracket. A full stop does not end one

- after a title or the like ("Dr."), or before the number that it announces ("No. 5", "vol. II");
- after an initial ("J. Smith") or another abbreviation ("etc.", "U.S.", "a.m."), unless a word follows that often
  begins a sentence ("The").

``。``, ``！`` and ``？`` always end one. A line's end always does.
"""

from __future__ import annotations

import re

_END = re.compile(
    r"""(?P<stop>[.!?…]+)["'”’»)\]]*(?P<space>\s+)(?=["'“‘«(\[]*(?P<next>\w+))"""  # noqa: RUF001
    r"""|(?P<wide>[。！？][”’」』）]*)(?=\S)"""  # noqa: RUF001
)
_WORD_BEFORE = re.compile(r"[^\s(\[\"'“‘«]+$")  # noqa: RUF001

_NEVER = frozenset(
    """adm al approx assn atty brig bros capt cf cmdr co col comdr corp cpl dept det dist dr ed eds est fr gen gov hon
    insp inst lt maj messrs mlle mme mr mrs ms mt mts pres prof prop pvt rep rev sen sgt sr st ste supt trans univ viz
    vs""".split()  # noqa: SIM905
)
"""Abbreviations that go on with what they abbreviate."""

_NUMBERED = frozenset("art ch eq fig figs no nos op p pl pp pt ref refs sec vol vols".split())  # noqa: SIM905
"""Abbreviations that announce a number."""

_SOMETIMES = frozenset(
    """a.d a.m b.c b.sc d.c dec e.g et etc feb hrs i.e inc jan jr jul jun lb lbs ltd m.d mar mins nov oct oz p.m ph.d
    sep sept apr aug ca km cm mm ft yr yrs mi""".split()  # noqa: SIM905
)
_OPENERS = frozenset(
    """A After All Although An And As At Because Before But By During Each For From Had Has Have He Her His How However
    I If In It Its Many More Most No On One Our She Since So Some Such That The Their Then There These They This Those
    Though Three Through To Two Under Until We What When Where Which While Who With You""".split()  # noqa: SIM905
)


def split_sentences(text: str) -> list[str]:
    r"""Split text into sentences; joined again they are the text, white space before a sentence belongs to it.

    >>> split_sentences('Dr. No met J. Bond. "Why?" he asked.')
    ['Dr. No met J. Bond.', ' "Why?" he asked.']
    """
    found = []
    for line in text.splitlines(keepends=True):
        start = 0
        for match in _END.finditer(line):
            if match["wide"] is None and not _ends(line, match):
                continue
            end = match.end("wide") if match["wide"] is not None else match.start("space")
            found.append(line[start:end])
            start = end
        if start < len(line):
            found.append(line[start:])
    return found


def _ends(line: str, match: re.Match[str]) -> bool:
    """Return whether a sentence ends at a stop that is followed by white space."""
    following = match["next"]
    if following[0].islower() or following[0] == "_":
        return False
    if match["stop"] != ".":
        return True
    before = _WORD_BEFORE.search(line, max(0, match.start() - 40), match.start())
    word = before[0] if before else ""
    if word.lower() in _NEVER:
        return False
    if word.lower() in _NUMBERED:
        return not re.fullmatch(r"\d\w*|[IVXLC]+", following)
    initial = len(word) == 1 and word.isupper()
    dotted = "." in word and all(len(part) <= 2 for part in word.split("."))
    if initial or dotted or word.lower() in _SOMETIMES:
        return following in _OPENERS and line[match.end("next") : match.end("next") + 1] != "."
    return True
