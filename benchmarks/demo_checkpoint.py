"""An untrained checkpoint in the original format, for the demonstration: ``python -m …demo_checkpoint --out DIR``.

No weights can be shipped yet, so this one has random weights: it goes through every step that a real one does, its
latency and its export error are real, and its scores mean nothing (the file says so, and so does every command).
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path

import click
import torch

from ..export.clip import ClipSpec, TextSpec
from ..export.registry import get_encoder
from ..runtime.errors import InputError
from ..runtime.files import atomic_folder
from ..runtime.manifest import CT_RATE_CLASSES

_SEED = 0
CHECKPOINT_NAME = "checkpoint.pth"
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def vocabulary() -> list[str]:
    """A WordPiece vocabulary that spells every word and holds those of the prompts whole."""
    words = sorted({word for name in CT_RATE_CLASSES for word in name.lower().split()} | {"is", "not", "present"})
    letters = string.ascii_lowercase + string.digits
    return [*_SPECIAL_TOKENS, *string.punctuation, *letters, *(f"##{letter}" for letter in letters), *words]


def write_demo_checkpoint(folder: Path, encoder: str, input_size: int) -> None:
    """Write ``checkpoint.pth`` and ``tokenizer/vocab.txt``."""
    torch.manual_seed(_SEED)
    words = vocabulary()
    text = TextSpec(vocab_size=len(words), hidden_size=128, layers=2, intermediate_size=512, max_positions=512,
                    token_types=2)
    spec = get_encoder(encoder)
    model = ClipSpec(spec, "channel", input_size, 8192, text).build()
    arguments = argparse.Namespace(model=spec.checkpoint_name, reduction="channel", input_size=input_size,
                                   untrained=True)
    torch.save({"model": model.state_dict(), "epoch": 0, "args": arguments}, folder / CHECKPOINT_NAME)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--encoder", type=click.Choice(["dcformer-nano", "dcformer-naive", "dcformer-tiny"]),
              default="dcformer-nano", show_default=True)
@click.option("--input-size", type=click.Choice(["128", "256", "512"]), default="512", show_default=True,
              help="Volumes of (S/2, S, S).")
def main(out: Path, encoder: str, input_size: str) -> None:
    """Write an untrained checkpoint and its tokenizer."""
    try:
        with atomic_folder(out, replace_if_it_holds=CHECKPOINT_NAME) as folder:
            write_demo_checkpoint(folder, encoder, int(input_size))
    except InputError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}/checkpoint.pth: {encoder}, input size {input_size}, UNTRAINED")


if __name__ == "__main__":
    main()
