"""CLIP pretraining on phantoms: ``python -m dcformer_deploy.benchmarks.phantom.train --out DIR``.

DCFormer-nano and a small BERT from scratch, with the symmetric contrastive loss and the temperature of the original
(e, not trained) between scans and reports, and beside it the prompt loss of CT-CLIP's VocabFine (Hamamci et al.,
arXiv:2403.17834): each of the 18 statements "... is present." against its negation. Two teachers that are dropped in
the end speed the image tower up: a linear head on the labels, and linear maps of where each finding lies. At last
projection and text tower are tuned with the image tower locked. An interrupted run goes on where it stopped. The result
is a checkpoint in the original format with its tokenizer.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import click

from ...runtime.backends import Options
from ...runtime.cli.output import progress
from ...runtime.errors import DcformerError, InputError
from .batches import TrainOptions
from .captions import write_vocabulary
from .dataset import DatasetOptions
from .samples import read_samples, write_samples
from .trainer import CHECKPOINT_NAME, PREPROCESSING, STATE_NAME, Trainer

LOG_NAME = "training.jsonl"
#: Parameters of glibc's mallopt: when freed memory goes back to the system, and what is mapped on its own.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Have glibc reuse large blocks: returning each to the system and faulting it in again doubles a step's time."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(_MMAP_MAX, 0)
            mallopt(_TRIM_THRESHOLD, -1)
            mallopt(_ARENA_MAX, 1)


def prepare(out: Path, samples: Path, options: TrainOptions, workers: int) -> None:
    """Paint what is missing and learn the vocabulary."""
    with progress(options.patients + options.monitored_patients) as display:
        for split, count in (("valid", options.monitored_patients), ("train", options.patients)):
            display.stage(f"painting patients ({split})")
            dataset = DatasetOptions(count, options.seed, split, prevalence=options.prevalence)
            write_samples(samples / split, dataset, PREPROCESSING, workers, display.advance)
    vocabulary = out / "tokenizer" / "vocab.txt"
    if not vocabulary.exists():
        vocabulary.parent.mkdir(parents=True, exist_ok=True)
        write_vocabulary(read_samples(samples / "train", options.patients), vocabulary)


def train(out: Path, samples: Path, options: TrainOptions, device: str, monitor_every: int) -> None:
    """Train in ``out``; prints and logs the loss and the AUROC on monitored scans as it goes."""
    trainer = Trainer(out, read_samples(samples / "train", options.patients),
                      read_samples(samples / "valid", options.monitored_patients), options, device)
    if (out / STATE_NAME).exists():
        trainer.load_state()
        click.echo(f"{out / STATE_NAME}: going on after step {trainer.step}")
    started, recent = time.monotonic(), []

    def report(phase: str, last: int, every: int, step: int, terms: dict[str, float]) -> None:
        recent.append(terms)
        if step % every and step != last:
            return
        judged = trainer.monitor()
        scores, head = judged["zero_shot"], statistics.mean(judged["head"].values())
        worst = min(scores, key=scores.__getitem__)
        means = {name: round(statistics.mean(entry[name] for entry in recent if name in entry), 4) for name in terms}
        recent.clear()
        line = {"phase": phase, "step": step, "minutes": round((time.monotonic() - started) / 60, 1), "loss": means,
                "mean_auroc": round(statistics.mean(scores.values()), 4), "head_auroc": round(head, 4), "auroc": scores,
                "head": judged["head"]}
        with (out / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        click.echo(f"{phase} {step}/{last}, {line['minutes']} min: {means}, AUROC mean {line['mean_auroc']:.3f}, "
                   f"lowest {scores[worst]:.3f} ({worst}), head {head:.3f}")

    trainer.run(partial(report, "step", options.steps, monitor_every))
    trainer.tune(partial(report, "tuning step", options.tuning_steps, monitor_every))
    trainer.save_checkpoint()
    click.echo(f"{out / CHECKPOINT_NAME}: {(out / CHECKPOINT_NAME).stat().st_size / 1e6:.1f} MB")


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to train in.")
@click.option("--samples", type=click.Path(path_type=Path), help="Folder of prepared phantoms; default: OUT/samples.")
@click.option("--patients", type=click.IntRange(min=16), default=250, show_default=True,
              help="Each is painted five times with other findings.")
@click.option("--steps", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--learning-rate", type=float, default=1.5e-3, show_default=True)
@click.option("--prevalence", type=float, default=0.3, show_default=True,
              help="Chance of each finding, in patients that are not normal.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--workers", type=click.IntRange(1, 256), help="Processes that paint; default: all usable cores.")
@click.option("--monitor-every", type=click.IntRange(min=1), default=200, show_default=True, help="In steps.")
def main(out: Path, samples: Path | None, patients: int, steps: int, batch_size: int, learning_rate: float,
         prevalence: float, seed: int, device: str, workers: int | None, monitor_every: int) -> None:
    """Paint phantoms, train DCFormer-nano on them, and write OUT/checkpoint.pth and OUT/tokenizer."""
    options = TrainOptions(patients, steps, batch_size, seed, learning_rate, prevalence)
    folder = samples or out / "samples"
    try:
        if batch_size > patients:
            raise InputError(f"--batch-size {batch_size}: more than --patients {patients}")
        keep_freed_memory()
        prepare(out, folder, options, workers or Options().thread_count)
        train(out, folder, options, device, monitor_every)
    except DcformerError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
