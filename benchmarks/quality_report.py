"""Tables and pictures of `benchmarks.quality`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from benchmarks.cells import Cell, Results, command
from benchmarks.suites import BASE_ROW, ONLY, UP_TO, Settings

COLUMNS = {
    "perplexity": "perplexity",
    "excess": "over 16-bit",
    "divergence": "KL, nats/token",
    "cpu_seconds": "CPU s",
    "wall_seconds": "wall s",
}
OURS, OTHERS = "#4c72b0", "#999999"


class Figure(NamedTuple):
    """Mean over the seeds and sample standard deviation, 0 of one."""

    mean: float
    spread: float

    @classmethod
    def of(cls, values: list[float]) -> Figure:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


@dataclass(frozen=True, slots=True)
class Row:
    """A cell with what was found: figures by COLUMNS, or the reason why there are none."""

    cell: Cell
    command: str
    figures: dict[str, Figure]
    full_precision: float | None = None
    reason: str = ""


def row(cell: Cell, threads: int, results: Results) -> Row:
    commands = [command(cell.argv(seed), threads) for seed in cell.seeds]
    found = [results.cells[each] for each in commands]
    if reasons := [each["reason"] for each in found if "reason" in each]:
        return Row(cell, commands[0], {}, reason=reasons[0])
    qualities = [next(iter(each["quality"].values())) for each in found]
    values = {
        "perplexity": [each["perplexity"] for each in qualities],
        "excess": [each["perplexity"] / each["full_precision"] - 1 for each in qualities],
        "divergence": [each["divergence"] for each in qualities],
        "cpu_seconds": [each["cpu_seconds"] for each in found],
        "wall_seconds": [each["wall_seconds"] for each in found],
    }
    figures = {name: Figure.of(held) for name, held in values.items()}
    return Row(cell, commands[0], figures, qualities[0]["full_precision"])


class Table(NamedTuple):
    title: str
    rows: list[Row]


def tables(rows: Iterable[Row]) -> list[Table]:
    """One per model, scheme and group, in the order of the rows."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for each in rows:
        found.setdefault((each.cell.model, each.cell.scheme, each.cell.group), []).append(each)
    return [Table(", ".join(filter(None, (Path(m).name, s, g))), held) for (m, s, g), held in found.items()]


def shown(name: str, figure: Figure) -> str:
    """A figure as people read it: percent for the excess, otherwise about four digits."""
    styles = {"excess": "{:+.1%}", "divergence": "{:.4f}", "cpu_seconds": "{:.1f}", "wall_seconds": "{:.1f}"}
    style = styles.get(name, "{:.3f}" if abs(figure.mean) < 1e4 else "{:.2e}")
    text = style.format(figure.mean)
    if not figure.spread or name.endswith("seconds"):
        return text
    return f"{text} ± {style.replace('+', '').format(figure.spread)}"


def table_cells(table: Table) -> list[list[str]]:
    """Texts of the rows, the 16-bit model first; "-" where there is no figure."""
    full_precision = next((each.full_precision for each in table.rows if each.full_precision is not None), None)
    lines = [] if full_precision is None else [["16-bit", f"{full_precision:.3f}", *[""] * (len(COLUMNS) - 1)]]
    for each in table.rows:
        texts = [shown(name, each.figures[name]) if each.figures else "-" for name in COLUMNS]
        lines.append([each.cell.row, *texts])
    return lines


def reasons(table: Table) -> list[str]:
    return [f"{each.cell.row}: {each.reason}" for each in table.rows if each.reason]


def terminal_table(table: Table):
    from rich.markup import escape
    from rich.table import Table as RichTable

    why = "\n".join(map(escape, reasons(table)))
    drawn = RichTable(title=table.title, title_justify="left", caption=why, caption_justify="left")
    drawn.add_column("", no_wrap=True)
    for heading in COLUMNS.values():
        drawn.add_column(heading, justify="right")
    for line in table_cells(table):
        drawn.add_row(*map(escape, line))
    return drawn


def markdown_table(headings: Iterable[str], lines: Iterable[Iterable[str]], words: int = 1) -> str:
    """The first ``words`` columns hold words, the others figures."""
    headings = list(headings)
    escaped = [[text.replace("|", r"\|") for text in line] for line in [headings, *lines]]
    made = ["| " + " | ".join(line) + " |" for line in escaped]
    made.insert(1, "|---" * words + "|---:" * (len(headings) - words) + "|")
    return "\n".join(made)


def markdown(suite: str, settings: Settings, rows: list[Row], estimated: dict[str, dict], machine: str) -> str:
    epochs = "their own number of" if settings.epochs is None else settings.epochs
    spread = f"; mean ± standard deviation over the seeds {list(settings.seeds)}" if len(settings.seeds) > 1 else ""
    parts = [
        f"# Quality: {suite}",
        f"{datetime.now(UTC):%Y-%m-%d}, {machine}. {settings.nsamples} x {settings.seqlen} tokens of "
        f"`{settings.calibration}` to calibrate, all of `{settings.evaluation}` to evaluate, in windows of "
        f"{settings.seqlen}; {epochs} epochs where windows are learned. KL is that of the quantized model's next-token "
        f"distribution from the 16-bit one's. Seconds are those of the calibration alone{spread}.",
    ]
    for model, blocks in estimated.items():
        widths = list(next(iter(blocks.values())))
        lines = [[block, *(f"{scores[bits]:.2e}" for bits in widths)] for block, scores in blocks.items()]
        table = markdown_table(["block", *(f"W{bits}" for bits in widths)], lines)
        parts += [f"## {Path(model).name}, estimated KL of rounding one block's weights, nats/token", table]
    for table in tables(rows):
        first = "block" if table.rows[0].cell.group in (ONLY, UP_TO) else ""
        parts += [f"## {table.title}", markdown_table([first, *COLUMNS.values()], table_cells(table))]
        parts += [f"- {reason}" for reason in reasons(table)]
        parts.append("\n".join(f"    {each.command}" for each in table.rows))
    return "\n\n".join(parts) + "\n"


def plot(suite: str, rows: list[Row], estimated: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    draw = _plot_blocks if suite == "sensitivity" else _plot_rows
    figure = draw(plt, rows, estimated)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_rows(plt, rows: list[Row], estimated):
    """A panel per table: how far every row's perplexity is above that of 16-bit, the figure beside it."""
    from matplotlib.ticker import LogLocator

    panels = [Table(table.title, [each for each in table.rows if each.figures]) for table in tables(rows)]
    columns = min(len(panels), 2)
    longest = max(len(table.rows) for table in panels)
    height = (0.8 + 0.24 * longest) * -(-len(panels) // columns)
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=(6.5 * columns, height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, table in zip(axes.flat, panels, strict=False):
        names = [each.cell.row for each in table.rows]
        excess = [100 * each.figures["excess"].mean for each in table.rows]
        errors = [100 * each.figures["excess"].spread for each in table.rows]
        highlighted = [name.startswith("sliderquant") or name == BASE_ROW for name in names]
        # Dots, not bars: on a logarithmic scale the length of a bar means nothing.
        for place, (value, error, ours) in enumerate(zip(excess, errors, highlighted, strict=True)):
            axis.errorbar(value, place, xerr=error or None, fmt="o", markersize=5, color=OURS if ours else OTHERS)
            text = shown("perplexity", table.rows[place].figures["perplexity"])
            axis.annotate(text, (value + error, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
        if BASE_ROW in names:
            axis.axvline(excess[names.index(BASE_ROW)], color=OURS, linewidth=0.8, zorder=0)
        if excess and min(excess) > 0:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel("perplexity above 16-bit, % (beside: perplexity)")
        axis.set_title(table.title, fontsize=10)
        axis.grid(axis="y", linewidth=0.3)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _plot_blocks(plt, rows: list[Row], estimated):
    """Per model: the estimate for every block and width, and what was measured block by block and cumulatively."""
    figure, axes = plt.subplots(len(estimated), 3, figsize=(15, 3.6 * len(estimated)), squeeze=False)
    for (model, blocks), line in zip(estimated.items(), axes, strict=True):
        widths = list(next(iter(blocks.values())))
        bars = {f"W{bits}": [scores[bits] for scores in blocks.values()] for bits in widths}
        _bars(line[0], bars, f"{Path(model).name}: estimated, weights of one block", log=True)
        measured = {group: {} for group in (ONLY, UP_TO)}
        for each in rows:
            if each.cell.model == model and each.figures:
                measured[each.cell.group].setdefault(each.cell.scheme, []).append(each.figures["divergence"].mean)
        for axis, group in zip(line[1:], measured, strict=True):
            _bars(axis, measured[group], f"measured, {group} rounded to nearest")
    return figure


def _bars(axis, series: dict[str, list[float]], title: str, log: bool = False) -> None:
    width = 0.8 / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        left = [place + (number - (len(series) - 1) / 2) * width for place in range(len(values))]
        axis.bar(left, values, width, label=name)
    if log:  # widths are orders of magnitude apart
        axis.set_yscale("log")
    axis.set_xlabel("decoder block")
    axis.set_ylabel("KL, nats per token")
    axis.set_title(title, fontsize=10, pad=20)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    # Above the bars, wherever the tallest one stands.
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=max(len(series), 1))
