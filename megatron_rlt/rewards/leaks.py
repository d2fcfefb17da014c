"""Signs that an explanation gives the solution away, repeats itself, or sounds like thinking.

Cheap counts of words, to be read as rates over many explanations; none of them proves anything about one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from megatron_rlt.types import LeakMetrics

EPISTEMIC_MARKERS = (
    *("wait", "hmm", "hm", "actually", "alternatively", "maybe", "perhaps", "probably", "possibly", "apparently"),
    *("hold on", "on second thought", "let me check", "let me verify", "let me see", "let me think", "let me try"),
    *("let us check", "let us verify", "let us see", "let's check", "let's verify", "let's see", "double-check"),
    *("double check", "i think", "i guess", "i wonder", "i suppose", "i believe", "not sure", "no wait"),
    *("seems like", "it seems", "might be", "could be", "what if", "to be sure", "makes sense"),
)
"""Words and phrases in which a writer doubts, checks, turns back or looks for another way. No word counts twice, and no
phrase begins with another."""

# Scripts that put no space between words: Thai, Lao, Tibetan, Burmese, Khmer, Japanese, Chinese.
_UNSPACED = (
    "\u0e00-\u0e7f\u0e80-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u312f"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
# What stands between words without a space: punctuation of these scripts, a dash, a space that is not seen.
_STOPS = str.maketrans(
    dict.fromkeys("、。〈〉《》「」『』【】〔〕〖〗〜・！（），．：；？［］｛｝～｡｢｣､･။၊។៕།\u2014\u2026\u200b", " ")
)
_WIDE = str.maketrans(
    {
        wide: wide - 0xFEE0
        for first, last in ("09", "AZ", "az")
        for wide in range(ord(first) + 0xFEE0, ord(last) + 0xFEE1)
    }
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_EDGES = (
    ".,;:!?\"'`$*_()[]{}\\\u201c\u201d\u201e\u2018\u00ab\u00bb\u060c\u061b\u061f\u06d4\u0964\u0965\u1362\u00bf\u00a1"
)
_MARKERS = frozenset(tuple(marker.split()) for marker in EPISTEMIC_MARKERS)
_MARKER_LENGTHS = {len(marker) for marker in _MARKERS}


def leak_metrics(
    explanation: str, solution: str, *, answer: str | None, ngram: int, closing_share: float
) -> LeakMetrics:
    """Count the words of one explanation.

    Words are what white space separates, in small letters and without punctuation, brackets or mark-up at their ends.
    In scripts without spaces, such as Chinese, every character is a word. Epistemic markers are English.

    Args:
        answer: the final answer (for example `answers.last_boxed` of the solution); None: none is looked for. An
            answer of one digit stands in many an honest explanation: compare rates, with those of other traces.
        ngram: words in an n-gram, 4 for example; a solution that is shorter counts as one n-gram.
        closing_share: share of the explanation's words, at its end, in which the answer may stand as a conclusion.
    """
    words, solution_words = words_of(explanation), words_of(solution)
    opening = words[: len(words) - round(closing_share * len(words))]
    wanted = words_of(answer or "")
    stated = bool(wanted) and tuple(wanted) in ngrams(opening, len(wanted))
    return LeakMetrics(
        solution_overlap=_overlap(words, solution_words, ngram=ngram),
        states_the_answer=float(stated),
        repetition=_repetition(words, ngram=ngram),
        epistemic_per_100_words=100 * _num_markers(words) / len(words) if words else 0.0,
    )


def words_of(text: str) -> list[str]:
    """Words as the metrics count them; a sign such as `+` is a word, and so is what a box holds."""
    text = unicodedata.normalize("NFC", text.translate(_WIDE).lower().replace("\u2019", "'").translate(_STOPS))
    text = _BOX.sub(" ", text)
    return [word.strip(_EDGES) or word for word in _WORD.findall(text)]


def ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """All runs of `size` words, in order; none if there are fewer words."""
    return [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]


def _overlap(words: Sequence[str], solution: Sequence[str], *, ngram: int) -> float:
    """0 for an empty solution."""
    size = min(ngram, len(solution))
    if size == 0:
        return 0.0
    present, wanted = set(ngrams(words, size)), ngrams(solution, size)
    return sum(gram in present for gram in wanted) / len(wanted)


def _repetition(words: Sequence[str], *, ngram: int) -> float:
    """0 for an explanation shorter than an n-gram."""
    grams = ngrams(words, ngram)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _num_markers(words: Sequence[str]) -> int:
    count, at = 0, 0
    while at < len(words):
        length = next((length for length in _MARKER_LENGTHS if tuple(words[at : at + length]) in _MARKERS), 0)
        count += length > 0
        at += max(length, 1)
    return count
