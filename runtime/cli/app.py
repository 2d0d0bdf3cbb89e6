"""Entry point of ``dcformer``: finds the command, and turns errors into one line and an exit code.

Exit codes: 0 ok, 1 a check failed, 2 bad input or usage, 3 the environment lacks something, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib import metadata
from typing import TextIO

import click

from ..errors import DcformerError, DcformerWarning, MissingDependency, suggestion

#: Command name -> module of this package that defines ``command``, and its line in ``dcformer --help``.
COMMANDS = {
    "export": ("export", "Turn a checkpoint into a bundle and prove that it computes the same."),
    "inspect": ("inspect", "Show what a bundle holds and check that it is intact."),
    "embed": ("embed", "Write image embeddings of scans to an .npz file."),
    "embed-text": ("embed_text", "Embed texts."),
    "zeroshot": ("zeroshot", "Score scans for 18 chest pathologies, or classes of your own, by text prompts."),
    "classify": ("classify", "Score scans with a fine-tuned detector."),
    "encoders": ("encoders", "List the encoders with parameters and GFLOPs beside the published ones."),
    "bench": ("bench", "Measure latency, memory and cold start, side by side with PyTorch."),
}
#: What must be installed for a package of this project to import.
_EXTRAS = {"torch": "export", "onnx": "export", "onnxscript": "export", "transformers": "export",
           "safetensors": "export", "onnxruntime": "cpu"}


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
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", DcformerWarning)
    try:
        result = cli.main(arguments, prog_name="dcformer", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except DcformerError as error:
        return _fail(str(error), error.exit_code)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "dcformer"
        return _fail(f"{error.format_message()} (see {command} --help)", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; nothing half-written is left behind", 130)
    except ModuleNotFoundError as error:
        if (extra := _EXTRAS.get((error.name or "").split(".")[0])) is None:
            raise
        missing = MissingDependency(f"{error.name} is not installed. Run: pip install 'dcformer-deploy[{extra}]'")
        return _fail(str(missing), missing.exit_code)
    except MemoryError:
        return _fail("out of memory; use a smaller input or a machine with more memory", 3)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away; Python would complain about it on exit
        return 141
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}", 3)


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our warnings as one line; those of libraries are for developers, not for users of this program."""
    if issubclass(category, DcformerWarning):
        click.echo(f"warning: {' '.join(str(message).split())}", err=True)


def run() -> None:
    """The console script."""
    sys.exit(main())
