"""``dcformer completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

PROGRAM, VARIABLE = "dcformer", "_DCFORMER_COMPLETE"
_SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options and their values.

    For bash: dcformer completion bash > ~/.local/share/bash-completion/completions/dcformer
    """
    completion = get_completion_class(shell)
    assert completion is not None  # click knows these shells
    click.echo(completion(context.find_root().command, {}, PROGRAM, VARIABLE).source())
