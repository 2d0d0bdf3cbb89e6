"""Cases of what is typed: texts, files of class names, options with any value."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from random import Random

import click

from dcformer_deploy.runtime.cli.app import COMMANDS

from .judge import Case
from .mutate import mutate_bytes, text
from .seeds import Seeds

#: Those that end within seconds whatever they are asked.
_QUICK = (
    "inspect",
    "embed",
    "embed-text",
    "zeroshot",
    "report",
    "classify",
    "search",
    "index",
    "prepare",
    "triton",
    "doctor",
    "completion",
)
_VALUES = (
    "",
    " ",
    "0",
    "-1",
    "1",
    "2",
    "3",
    "nan",
    "inf",
    "1e308",
    "-inf",
    "1e400",
    "99999999999999999999",
    "x",
    "--",
    "./x",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "scan.nii",
    ".",
    "é",
    "a,b",
    "fp16",
    "cuda",
    "openvino",
    "auto",
    "a" * 300,
    "\udcff",
)


def prompts(random: Random, seeds: Seeds, folder: Path) -> Case:
    """Texts to embed, and files of class names."""
    if random.random() < 0.5:
        texts = [text(random) for _ in range(random.choice((1, 1, 3)))]
        return Case(["embed-text", str(seeds.bundle), "--json", "--", *texts])
    names = "\n".join(text(random) for _ in range(random.choice((1, 3, 40)))).encode("utf-8", "surrogatepass")
    if random.random() < 0.4:
        names = mutate_bytes(random, b"Effusion\nNodule\nCardiomegaly\n")
    (folder / "c.txt").write_bytes(names)
    return Case(["zeroshot", str(seeds.bundle), str(seeds.nifti), "--classes", "c.txt", "--json"])


def options(random: Random, seeds: Seeds, folder: Path) -> Case:
    """Any options of a command, with any value."""
    name = random.choice(_QUICK)
    command: click.Command = importlib.import_module(f"dcformer_deploy.runtime.cli.{COMMANDS[name][0]}").command
    shutil.copytree(seeds.store, folder / "s")  # some commands write into it
    good = {
        "bundle": str(seeds.bundle),
        "store": "s",
        "scans": str(seeds.nifti),
        "scan": str(seeds.nifti),
        "inputs": str(seeds.nifti),
        "texts": "Effusion.",
        "queries": "Effusion.",
        "shell": "bash",
    }
    words = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            if random.random() < 0.9:
                words.append(
                    good.get(parameter.name or "", "x") if random.random() < 0.85 else random.choice(_VALUES)
                )
        elif random.random() < (0.9 if parameter.required else 0.15) and "--ray" not in parameter.opts:
            words.append(random.choice(parameter.opts))
            if isinstance(parameter, click.Option) and not parameter.is_flag:
                words += [_value(random, parameter) for _ in range(parameter.nargs)]
    if random.random() < 0.05:
        words.append(random.choice(("--nothing", "-", "-x")))
    new = ("out", "e.npz", "r.html", "s")
    return Case([name, *words], outputs=(*new, *_VALUES), kept=new)


def _value(random: Random, option: click.Option) -> str:
    if isinstance(option.type, click.Choice) and random.random() < 0.7:
        return str(random.choice(list(option.type.choices)))
    if option.name == "out" and random.random() < 0.7:
        return random.choice(("out", "e.npz", "r.html"))
    return random.choice(_VALUES)
