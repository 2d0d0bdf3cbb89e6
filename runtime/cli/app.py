"""The program ``dcformer``: finds the command, and turns errors into one line and an exit code.

Exit codes: 0 ok, 1 a check failed, 2 bad input or usage, 3 the environment lacks something, 130 interrupted, 141 the
reader of the output went away, 143 terminated.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import re
import signal
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import TextIO

import click
from click.shell_completion import shell_complete

from ..errors import DcformerError, DcformerWarning, MissingDependency, install, one_line, suggestion
from .completion import PROGRAM, VARIABLE

#: Command name -> module of this package that defines ``command``, and its line in ``dcformer --help``.
COMMANDS = {
    "export": ("export", "Turn a checkpoint into a bundle and prove that it computes the same."),
    "inspect": ("inspect", "Show what a bundle holds and check that it is intact."),
    "prepare": ("prepare", "Preprocess scans once, so that evaluation, calibration and the like read them faster."),
    "embed": ("embed", "Embed scans, few or fifty thousand, into a store that is gone on with after any end."),
    "search": ("search", "Find the scans of a store that are nearest to a text or a scan."),
    "index": ("index", "Build an approximate index of a store, and measure its recall."),
    "triton": ("triton", "Write a model repository for NVIDIA's Triton Inference Server."),
    "embed-text": ("embed_text", "Embed texts."),
    "zeroshot": ("zeroshot", "Score scans for 18 chest pathologies, or classes of your own, by text prompts."),
    "report": ("report", "Write a page on a scan: slices, scores, where the encoder looked, how it was read."),
    "classify": ("classify", "Score scans with a fine-tuned detector."),
    "evaluate": ("evaluate", "Judge a bundle on a data set in CT-RATE's layout: AUROC, F1, retrieval."),
    "doctor": ("doctor", "Show what is installed, which devices there are, and what would run a bundle, and why."),
    "completion": ("completion", "Print what makes a shell complete commands, options and their values."),
    "encoders": ("encoders", "List the encoders with parameters and GFLOPs beside the published ones."),
    "phantom": ("phantom", "Make synthetic chest CTs with known findings, in CT-RATE's layout."),
    "calibrate": ("calibrate", "Add FP16 and INT8 graphs to a bundle, from scans like those that it will see."),
    "sensitivity": ("sensitivity", "Rank layers by what INT8 does to them; find the most INT8 that keeps a target."),
    "retention": ("retention", "Show how well FP16 and INT8 keep the answers of fp32."),
    "build": ("build", "Build TensorRT engines of a bundle's graphs, into the bundle."),
    "check": ("check", "Run every graph and engine of a bundle on the same inputs and compare."),
    "bench": ("bench", "Measure latency and memory: a bundle beside PyTorch, or all encoders."),
    "profile": ("profile", "Show where the time goes: phases of scoring a scan, operators of the image tower."),
}
#: What must be installed for a package of this project to import.
_EXTRAS = {"torch": "export", "onnx": "export", "onnxscript": "export", "onnx_ir": "export", "transformers": "export",
           "safetensors": "export", "onnxruntime": "cpu", "pyarrow": "store", "zarr": "store", "pydicom": "dicom",
           "ray": "cluster", "usearch": "search", "tritonclient": "triton", "google": "triton", "scipy": "phantom",
           "PIL": "report", "jinja2": "report", "sklearn": "evaluate", "matplotlib": "bench", "adjustText": "bench"}


#: About what the user named; others, such as a full disk, are the machine's.
_USERS_ERRORS = (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS,
                 errno.EEXIST, errno.ELOOP, errno.EINVAL)
#: Characters of an error's line.
_LONGEST_MESSAGE = 2000


class _LazyCommands(click.Group):
    """Imports a command's module only when that command is used, so that ``--help`` needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[cmd_name][0]}", __package__)
        return module.command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(f"no command {args[0]!r}{suggestion(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=_LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(metadata.version("dcformer-deploy"), prog_name="dcformer")
def cli() -> None:
    """Export 3-D CT vision-language encoders and run them without PyTorch. Research use only."""


def main(arguments: list[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: command line without the program's name; None = the process's own.

    Returns:
        The exit code.
    """
    _prepare_streams()
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", DcformerWarning)
    arguments = sys.argv[1:] if arguments is None else arguments
    if (wanted := os.environ.get(VARIABLE)) is not None:  # asked by the shell, not by the user
        return shell_complete(cli, {}, PROGRAM, VARIABLE, wanted)
    try:
        # Not cli.main(): it turns a closed pipe into exit code 1, which here means that a check failed.
        with cli.make_context("dcformer", arguments or ["--help"]) as context:
            result = cli.invoke(context)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as end:  # --help and --version
        return end.exit_code
    except BrokenPipeError:
        return _reader_went_away()
    except Exception as error:
        if (failure := _explain(error)) is None:
            raise
        return _fail(*failure)
    except KeyboardInterrupt:
        return _fail("interrupted; files that were being written have been removed", 130)


def _explain(error: Exception) -> tuple[str, int] | None:
    """Message and exit code of an error that is the user's or the machine's; None for one of this program's own."""
    if isinstance(error, DcformerError):
        return str(error), error.exit_code
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "dcformer"
        return f"{error.format_message().rstrip('.')}{_meant(error)} (see {command} --help)", 2
    if isinstance(error, click.ClickException):
        return error.format_message(), 2
    if isinstance(error, click.Abort):
        return "aborted", 130
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get((error.name or "").split(".")[0])):
        missing = MissingDependency(f"{error.name} is not installed; {install(extra)}")
        return str(missing), missing.exit_code
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller input or a machine with more memory", 3
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}", 2 if error.errno in _USERS_ERRORS else 3
    return None


def _meant(error: click.UsageError) -> str:
    """The nearest of an option's values, which click lists and does not suggest."""
    values = error.param.type if isinstance(error, click.BadParameter) and error.param is not None else None
    wrong = re.match("'(.*)' is not one of ", error.message)
    return suggestion(wrong[1], map(str, values.choices)) if wrong and isinstance(values, click.Choice) else ""


def _prepare_streams() -> None:
    """A missing stream becomes a silent one, and file names need not be valid in the terminal's encoding."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (open until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _reader_went_away() -> int:
    """What a shell reports for SIGPIPE; nothing more is written, also not by Python on its way out."""
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    return 128 + signal.SIGPIPE


def _fail(message: str, code: int) -> int:
    message = one_line(message)
    if len(message) > _LONGEST_MESSAGE:  # a file's own text or name, pages of it
        half = _LONGEST_MESSAGE // 2
        message = f"{message[:half]} … {message[-half:]}"
    with contextlib.suppress(OSError):  # nobody can be told where standard error is full or closed
        click.echo(f"error: {message}", err=True)
    return code


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our warnings as one line; those of libraries are for developers, not for users of this program."""
    if issubclass(category, DcformerWarning):
        click.echo(f"warning: {one_line(str(message))}", err=True)
