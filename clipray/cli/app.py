"""The command line app: its consoles, and the options that several verbs share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from clipray import __version__
from clipray.errors import JobError, Stopped
from clipray.runner.printing import PlainConsole

if TYPE_CHECKING:
    from clipray.job import Model


class _Verbs(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # which typer would turn into an exit without a word
            raise Stopped("stopped") from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Show a section for each `rich_help_panel`; typer does so only if Rich draws the help."""
        width = max(map(len, self.list_commands(ctx)))
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            line = command.get_short_help_str(formatter.width - width - 4)
            sections.setdefault(command.rich_help_panel, []).append((name.ljust(width), line))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


app = typer.Typer(
    name="clipray",
    cls=_Verbs,
    help="Turn images and texts into Parquet tables that you can query.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = PlainConsole(highlight=False)
err = PlainConsole(stderr=True, highlight=False)

JobServer = Annotated[
    str, typer.Option(help="The cluster's job server: http://HEAD:8265.", envvar="RAY_API_SERVER_ADDRESS")
]
Fresh = Annotated[list[str], typer.Option(help="Delete this table and make it anew; may be repeated.")]
MODEL = "open_clip model name, timm/NAME, hf-hub:…, local-dir:…, hf:…, config file, or demo."
ModelName = Annotated[str, typer.Option(help=MODEL)]
Pretrained = Annotated[
    str | None, typer.Option(help="Tag, checkpoint path or URL, or random. [default: openai for ViT-B-32]")
]
Seed = Annotated[int | None, typer.Option(help="Seed of random weights.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column `label`: `folder`, or a regular expression on image_id.")]
UriColumn = Annotated[str | None, typer.Option("--uri", help="The column of paths or URLs.")]
IdColumn = Annotated[str | None, typer.Option("--id", help="The column of ids.")]
ImagesFolder = Annotated[str | None, typer.Option("--images", help="The folder that paths in a list are relative to.")]
NoRetry = Annotated[
    bool,
    typer.Option(
        "--no-retry", help="Leave rows rejected that failed for a temporary reason (a server that is away or busy)."
    ),
]
RetryRejects = Annotated[bool, typer.Option("--retry-rejects", help="Try the rejected rows of an earlier run again.")]


def _version(value: bool) -> None:
    if value:
        out.print(f"clipray {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def model_settings(name: str, pretrained: str | None, seed: int | None) -> Model:
    """The settings of a model that is named on the command line."""
    from pydantic import ValidationError

    from clipray.job import Model

    if pretrained is None and name == "ViT-B-32":
        pretrained = "openai"
    try:
        return Model(name=name, pretrained=pretrained, seed=seed)
    except ValidationError as error:
        raise JobError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
