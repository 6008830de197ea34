"""The command line: train a model, evaluate its grid, profile it, choose a cell, cut the model to it."""

import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from transformers.utils import logging

from . import inference, training
from ._version import __version__
from .inference import Choice, Grid, GridEvaluator, Profile, outputs, plots, truncate_model
from .inference.tables import SUFFIXES, read_table

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError:
    raise SystemExit("m2d needs typer and rich: pip install 'm2d_ext[cli]'") from None

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# As shells have it: 128 and the number of the signal.
INTERRUPTED = 130
TERMINATED = 143

Model = Annotated[str, typer.Argument(help="A SentenceTransformer: a folder or a name.", show_default=False)]
Dims = Annotated[str | None, typer.Option(help="As 384,128.", show_default="the model's and its halves")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model in OUTPUT, and all beside it there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]


class FinalNorm(str, Enum):
    """Of the loss."""

    skip = "skip"
    apply = "apply"


class KLTarget(str, Enum):
    """Of the loss."""

    features = "features"
    scores = "scores"


class Refusal(Exception):
    """Bad input: one line, and exit code 2."""


class Terminated(BaseException):
    """SIGTERM. As for KeyboardInterrupt, no ``except Exception`` on its way takes it for an error."""


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print it and end.")] = False
) -> None:
    """From a trained 2D Matryoshka model to the cell that you deploy."""
    if version:
        print(f"m2d_ext {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        text = context.get_help()
        if text:  # none where rich has printed it
            print(text)
        raise typer.Exit(2)


@app.command(
    epilog="Example: m2d train sentence-transformers/all-MiniLM-L6-v2 outputs/model --data pairs.tsv --eval sts.tsv"
)
def train(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The folder of the trained model.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            help="Rows with the columns anchor and positive, perhaps negative (or negative_1, negative_2, ...): .tsv, "
            ".csv or .jsonl, perhaps .gz, or a dataset's name.",
            show_default=False,
        ),
    ],
    evaluate: Annotated[
        str | None, typer.Option("--eval", help="Rows to score the grid on before and after, as for m2d grid.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a named dataset.")] = "train",
    dims: Dims = None,
    layers_per_step: Annotated[int, typer.Option(help="Earlier layers drawn per step; -1 for all.")] = -1,
    dims_per_step: Annotated[int, typer.Option(help="Dims drawn per step; -1 for all.")] = -1,
    epochs: Annotated[float, typer.Option(help="More than 0.")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="In place of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    mini_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Embed so many texts at a time: less memory.")
    ] = None,
    lr: Annotated[float, typer.Option(help="At the end of the warmup; more than 0.")] = 5e-5,
    warmup_ratio: Annotated[float, typer.Option(min=0, max=1)] = 0.1,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per text, in the training and in both grids. The saved model keeps its own limit.",
            show_default="the model's",
        ),
    ] = None,
    prior_layers_weight: Annotated[
        float, typer.Option(min=0, help="Of the mean of the earlier layers' losses; their number is a good choice.")
    ] = 1.0,
    kl_weight: Annotated[float, typer.Option(min=0, help="Of the pull of the last layer on the earlier ones.")] = 1.0,
    final_norm: Annotated[
        FinalNorm, typer.Option(help="apply: train what a pre-norm model serves when cut.")
    ] = FinalNorm.skip,
    kl_target: Annotated[
        KLTarget, typer.Option(help="What the last layer teaches: its embeddings, or how it ranks the batch.")
    ] = KLTarget.features,
    prompts: Annotated[
        bool, typer.Option(help="Whether to put the model's own prompts for queries and documents in front of texts.")
    ] = True,
    seed: int = 0,
    heatmap: Annotated[Path | None, typer.Option(help="Draw the grids before and after; needs --eval.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train all layers × all dims of MODEL on pairs or triplets."""
    outputs.check_folder("OUTPUT", output, overwrite)
    if heatmap is not None and evaluate is None:
        raise Refusal("--heatmap needs --eval, whose grids it draws")
    _check_pictures(heatmap=heatmap)
    widths = _numbers("--dims", dims)
    rows = _read_rows("--data", data, split)
    evaluator = None
    if evaluate is not None:
        evaluator = GridEvaluator(_read_rows("--eval", evaluate, "test"), dims=widths, show_progress_bar=False)
    loaded = _load(model)
    training.to_float32(loaded)
    with _options_named(
        dims="--dims",
        n_layers_per_step="--layers-per-step",
        n_dims_per_step="--dims-per-step",
        epochs="--epochs",
        learning_rate="--lr",
        max_length="--max-length",
    ):
        trained = training.train(
            loaded,
            rows,
            output,
            dims=widths,
            evaluator=evaluator,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            learning_rate=lr,
            warmup_ratio=warmup_ratio,
            max_length=max_length,
            seed=seed,
            show_progress=not as_json,
            overwrite=overwrite,
            prompts=None if prompts else {},
            n_layers_per_step=layers_per_step,
            n_dims_per_step=dims_per_step,
            mini_batch_size=mini_batch_size,
            prior_layers_weight=prior_layers_weight,
            kl_div_weight=kl_weight,
            final_norm=final_norm.value,
            kl_target=kl_target.value,
        )
    grids = {name: grid for name, grid in (("before", trained.before), ("after", trained.after)) if grid is not None}
    if heatmap is not None:
        _write(heatmap, lambda path: plots.heatmap(grids["after"], path, grids["before"]))
    facts = {"output": str(output), "training_loss": trained.loss}
    if as_json:
        print(json.dumps(facts | {name: grid.to_json() for name, grid in grids.items()}, indent=1))
        return
    for name, grid in grids.items():
        _print(_grid_table(grid, f"{name}: "))
    print(f"mean loss {trained.loss:.4f}; model in {output}")


@app.command(
    epilog="Example: m2d grid outputs/model --data stsb_test.tsv.gz --dims 384,128 --output grid.json --heatmap g.png"
)
def grid(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Rows: .tsv, .csv or .jsonl, perhaps .gz, or a dataset's name. Columns: sentence1, sentence2 (or s1, "
            "s2) and score or label (0 and 1 are classes, fractions are scores); anchor, positive, perhaps negative.",
            show_default=False,
        ),
    ],
    dims: Dims = None,
    layers: Annotated[str | None, typer.Option(help="As 0,3,6.", show_default="all")] = None,
    split: Annotated[str, typer.Option(help="Of a named dataset.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    output: Annotated[Path | None, typer.Option(help="Write the grid as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a line per cell.")] = None,
    heatmap: Annotated[Path | None, typer.Option(help="Draw layers × dims.")] = None,
    curves: Annotated[Path | None, typer.Option(help="Draw a line per dim.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score every layer and dim of MODEL, from one encode of the data."""
    _check_files(output=output, csv=csv)
    _check_pictures(heatmap=heatmap, curves=curves)
    wanted = {"layers": _numbers("--layers", layers), "dims": _numbers("--dims", dims)}
    rows = _read_rows("--data", data, split)
    with _options_named(layers="--layers", dims="--dims"):
        evaluator = GridEvaluator(rows, **wanted, batch_size=batch_size, show_progress_bar=False)  # type: ignore[arg-type]
        found = evaluator.grid(_load(model))
    for path, write in (
        (output, found.write),
        (csv, found.write_csv),
        (heatmap, lambda path: plots.heatmap(found, path)),
        (curves, lambda path: plots.curves(found, path)),
    ):
        _write(path, write)
    _show(as_json, found.to_json(), lambda: _grid_table(found))


@app.command(epilog="Example: m2d profile outputs/model --output profile.json")
def profile(
    model: Model,
    layers: Annotated[str | None, typer.Option(help="As 2,4,6.", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; figures are medians.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Write the profile as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast MODEL encodes on this machine, cut to fewer layers."""
    _check_files(output=output)
    numbers = _numbers("--layers", layers)
    loaded = _load(model)
    with _options_named(num_layers="--layers", layers="--layers"):
        found = inference.profile(loaded, layers=numbers, batch_size=batch_size, repeats=repeats)
    _write(output, found.write)
    _show(as_json, found.to_json(), lambda: _profile_table(found))


@app.command(epilog="Example: m2d choose grid.json --profile profile.json --min-quality 98% --plot front.png")
def choose(
    grid: Annotated[Path, typer.Argument(help="What `m2d grid --output` wrote.", show_default=False)],
    profile: Annotated[Path | None, typer.Option(help="What `m2d profile --output` wrote.")] = None,
    model: Annotated[str | None, typer.Option(help="Profile this model now.")] = None,
    min_quality: Annotated[str | None, typer.Option(help="A score, or a share of the best cell's: 98%.")] = None,
    max_latency: Annotated[float | None, typer.Option(help="Milliseconds to encode one text.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Of a vector in an index.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw quality against latency.")] = None,
    as_json: AsJson = False,
) -> None:
    """Pick a cell of GRID, and list the cells worth having."""
    if (profile is None) == (model is None):
        raise Refusal("give one of --profile and --model")
    _check_pictures(plot=plot)
    _check_file(grid)
    found = inference.Grid.read(grid)
    if profile is not None:
        _check_file(profile)
        costs = inference.Profile.read(profile)
    else:
        loaded = _load(str(model))
        with _options_named(num_layers="GRID's layers", layers="GRID's layers"):
            costs = inference.profile(loaded, layers=found.layers)
    with _options_named(min_quality="--min-quality", max_latency="--max-latency", max_bytes="--max-bytes"):
        choice = inference.choose(found, costs, min_quality=min_quality, max_latency=max_latency, max_bytes=max_bytes)
    _write(plot, lambda path: plots.front(choice, path))
    _show(as_json, choice.to_json(), lambda: _choice_table(choice))


@app.command(epilog="Example: m2d cut outputs/model --layers 3 --dim 128 outputs/small")
def cut(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The folder of the cut model.", show_default=False)],
    layers: Annotated[int | None, typer.Option(help="Layers to keep.", show_default="all")] = None,
    dim: Annotated[int | None, typer.Option(help="Dimensions to keep.", show_default="all")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Save MODEL's first layers and dimensions: a plain SentenceTransformer."""
    if layers is None and dim is None:
        raise Refusal("give --layers, --dim or both")
    outputs.check_folder("OUTPUT", output, overwrite)
    loaded = _load(model)
    with _options_named(num_layers="--layers", dim="--dim"):
        small = truncate_model(loaded, layers, dim)
    with outputs.new_folder(output, overwrite) as folder:
        small.save_pretrained(str(folder))
    sizes = [sum(p.numel() for p in each.parameters()) for each in (loaded, small)]
    facts = {**small[0].auto_model.config.m2d_ext_cut, "parameters": sizes[1], "of_parameters": sizes[0]}
    _show(as_json, {"output": str(output), **facts}, lambda: _facts_table(str(output), facts))


def main() -> None:
    """The console script."""
    try:
        # Typer's own messages for what it refuses by itself. Its versions return the code of an exit, or raise it; and
        # of an interrupt they make an exit or an abort, or let it pass.
        with _sigterm_raised():
            code = app(standalone_mode=False)
    except typer.Exit as done:
        code = done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Terminated:
        _fail("terminated", TERMINATED)
    except (Refusal, ValueError, ImportError) as error:
        _fail(str(error), 2)
    except (OSError, SafetensorError) as error:
        _fail(str(error), 1)
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        _fail(message(), getattr(error, "exit_code", 2))
    if code == INTERRUPTED:
        _fail("interrupted", INTERRUPTED)
    if code:
        raise SystemExit(code)


@contextmanager
def _sigterm_raised() -> Iterator[None]:
    """SIGTERM by itself ends Python on the spot, and leaves half-written folders behind."""

    def terminate(*_: object) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> NoReturn:
    print(f"m2d: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise Refusal(f"{option} must be numbers with commas between, got {text!r}") from None


@contextmanager
def _options_named(**options: str) -> Iterator[None]:
    """A message of the library starts with the name of its argument; here, of the option that gave it."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name not in options:
            raise
        raise Refusal(f"{options[name]} {rest}") from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise Refusal(f"there is no file {path}")


def _check_files(**paths: Path | None) -> None:
    """Before the work, of the options that say where results go."""
    for name, path in paths.items():
        if path is not None:
            outputs.check_file(f"--{name}", path)


def _check_pictures(**paths: Path | None) -> None:
    for name, path in paths.items():
        if path is not None:
            plots.check_suffix(f"--{name}", path)
    _check_files(**paths)


def _read_rows(option: str, data: str, split: str) -> Any:
    """Rows of a file or of a named dataset."""
    path = Path(data)
    if not path.name.removesuffix(".gz").endswith(SUFFIXES) and not path.exists():
        return _named_rows(option, data, split)
    _check_file(path)
    return read_table(path)


def _named_rows(option: str, name: str, split: str) -> Any:
    try:
        from datasets import disable_progress_bars, load_dataset
    except ImportError:
        # Perhaps the name was meant for a file.
        raise Refusal(
            f"{option} {name} is no file, and a dataset's name needs datasets: pip install 'm2d_ext[cli]'"
        ) from None
    disable_progress_bars()
    try:
        return load_dataset(name, split=split)
    except Exception as error:  # of many kinds: no network, no such name, no such split
        raise Refusal(f"{option} {name} is no file, and no dataset that can be loaded: {error}") from error


def _load(name: str) -> Any:
    logging.disable_progress_bar()
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
        raise Refusal(f"there is no folder {name}")
    try:
        return SentenceTransformer(str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name)
    except Exception as error:  # of many kinds, by which of its files is missing or broken
        raise Refusal(f"{name} is no model that can be loaded: {type(error).__name__}: {error}") from error


def _write(path: Path | None, write: Callable[[Path], None]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)


def _show(as_json: bool, data: dict[str, Any], table: Callable[[], Table]) -> None:
    if as_json:
        print(json.dumps(data, indent=1))
    else:
        _print(table())


def _print(table: Table) -> None:
    """With whole figures: if need be set tightly, and then in lines longer than the terminal's, which it wraps."""
    console = Console(markup=False, emoji=False)  # a path may hold [brackets] or :colons:
    unlimited = console.options.update(max_width=sys.maxsize)
    if console.measure(table, options=unlimited).maximum > console.width:
        table.padding = 0
    console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)


def _grid_table(grid: Grid, title: str = "") -> Table:
    table = Table(title=f"{title}{grid.metric} by layers and dimensions", caption=f"mean {grid.mean():.4f}")
    table.add_column("layers", justify="right")
    for dim in grid.dims:
        table.add_column(str(dim), justify="right")
    for layer, row in zip(grid.layers, grid.scores, strict=True):
        table.add_row(str(layer), *("-" if math.isnan(score) else f"{score:.4f}" for score in row))
    return table


def _profile_table(profile: Profile) -> Table:
    machine = ", ".join(
        f"{value} {name}" if name == "threads" else str(value) for name, value in profile.machine.items()
    )
    table = Table(title="Encoding by layers", caption=f"{machine}; batches of {profile.batch_size}")
    for name in ("layers", "texts/s", "one text, ms", "parameters, MB", "peak, MB"):
        table.add_column(name, justify="right")
    peaks: Sequence[int | None] = profile.peak_bytes or [None] * len(profile.layers)
    columns = profile.layers, profile.texts_per_second, profile.latency_ms, profile.parameter_bytes, peaks
    for layer, speed, latency, size, peak in zip(*columns, strict=True):
        memory = "-" if peak is None else f"{peak / 1e6:.0f}"
        table.add_row(str(layer), f"{speed:.0f}", f"{latency:.2f}", f"{size / 1e6:.1f}", memory)
    return table


def _choice_table(choice: Choice) -> Table:
    table = Table(title="Cells worth having", caption="→ the pick")
    for name in ("", "layers", "dims", choice.metric, "one text, ms", "bytes/vector"):
        table.add_column(name, justify="right")
    for cell in choice.front:
        mark = "→" if cell == choice.pick else ""
        numbers = f"{cell.quality:.4f}", f"{cell.latency_ms:.2f}", str(cell.bytes_per_vector)
        table.add_row(mark, str(cell.layer), str(cell.dim), *numbers, style="bold" if mark else None)
    return table


def _facts_table(output: str, facts: dict[str, Any]) -> Table:
    table = Table(title=output)
    for name in ("", "kept", "of"):
        table.add_column(name, justify="right")
    table.add_row("layers", str(facts["num_layers"]), str(facts["of_layers"]))
    table.add_row("dimensions", str(facts["dim"]), str(facts["of_dims"]))
    table.add_row("parameters", f"{facts['parameters']:,}", f"{facts['of_parameters']:,}")
    return table
