"""The command that makes a folder to start from: `loram init`."""

from pathlib import Path

import typer

from loram.base.options import Options, option


class Init(Options):
    """The flags of `loram init`."""

    model: str = option(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "The model that the recipes name: a hub id, a folder or a .gguf file.",
    )


def init(out: Path, model: str = Init().model) -> None:
    """Write recipes and data to start from into a new folder.

    OUT gets the recipes of the documentation, and 2,200 word problems to train on and to test with. Run them inside
    OUT, and change what you like.
    """
    from loram.recipes.start import write_start

    write_start(out, model)
    typer.echo(f"{out}: recipes and data written; next: cd {out} && loram run recipes/quickstart.yaml")
