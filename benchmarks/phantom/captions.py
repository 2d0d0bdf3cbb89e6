"""The texts that training shows with a scan, and the WordPiece vocabulary they need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import BertWordPieceTokenizer

from ...export.make_bundle import NEGATIVE_PROMPT, POSITIVE_PROMPT
from ...runtime.manifest import CT_RATE_CLASSES
from .reports import Report, write_report
from .samples import Sample

VOCABULARY_SIZE = 800
_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_REPORTS_PER_SAMPLE = 4
#: The original's placeholder for an empty column; it is not shown to the model.
NOT_GIVEN = "Not given."


def report_text(report: Report) -> str:
    """Findings and impression as one text, without the placeholder."""
    return " ".join(part for part in (report.findings, report.impression) if part != NOT_GIVEN)


def statements() -> list[str]:
    """The zero-shot prompts of every finding, positive then negative."""
    return [prompt.replace("{}", name) for name in CT_RATE_CLASSES for prompt in (POSITIVE_PROMPT, NEGATIVE_PROMPT)]


def write_vocabulary(samples: Sequence[Sample], path: Path) -> None:
    """Learn a lower-cased WordPiece vocabulary from reports on these samples and the prompts, as ``vocab.txt``."""
    rng = np.random.default_rng(0)
    texts = [report_text(write_report(sample.present, rng)) for sample in samples for _ in range(_REPORTS_PER_SAMPLE)]
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator([*texts, *statements()], vocab_size=VOCABULARY_SIZE, min_frequency=2,
                                  special_tokens=_SPECIAL_TOKENS, show_progress=False)
    words = tokenizer.get_vocab(with_added_tokens=True)
    path.write_text("\n".join(sorted(words, key=words.__getitem__)) + "\n", encoding="utf-8")
