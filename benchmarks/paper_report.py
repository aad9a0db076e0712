"""What `benchmarks.paper_tables` prints: the paper's rows and ours side by side, and what a run will weigh."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.paper_numbers import Entry
from benchmarks.quality_report import markdown_table

TEXTS = ("WikiText2", "C4")
NOTES = (
    "Perplexity as calibration computes it; WikiText2 and C4 in windows as in the published code. Zero-shot tasks as "
    "served by vLLM: accuracy in percent, normalized by length where lm-eval has that.",
    "W4A4: K and V are kept in 4 bits in calibration and perplexity; the published code quantizes Q too. vLLM serves "
    "the tasks with a cache of 16 bits.",
    "W4A4 of SliderQuant starts from a model whose rotation is folded into the weights, as the published "
    "configuration does. SliderQuant+ adds a rotation in front of down_proj at inference; the paper's has further "
    "ones, of Q, K and in front of o_proj. QuaRot stands for GPTQ on the same rotated model.",
    "CBQ is the paper's own: windows of two blocks, one stage, low-rank adaptation alone (its tables 8 and 12).",
    "Table 4: groups of 128 and C4 for calibration, but one scale per channel with W4A4, where the checkpoint format "
    "has no groups.",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the size of a model: of dense ones, and of mixtures of experts."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128
    experts: int = 1

    @property
    def linear_weights(self) -> int:
        """Of the decoder blocks: what is quantized."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate * self.experts)

    @property
    def other_weights(self) -> int:
        """Embedding and head, which stay in 16 bits; norms and routers are negligible."""
        return 2 * self.vocabulary * self.hidden

    @classmethod
    def read(cls, directory: str) -> Shape:
        config = json.loads((Path(directory) / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            config["hidden_size"],
            config["num_hidden_layers"],
            config.get("moe_intermediate_size") or config["intermediate_size"],
            heads,
            config.get("num_key_value_heads", heads),
            config["vocab_size"],
            config.get("head_dim") or config["hidden_size"] // heads,
            config.get("num_experts", 1),
        )


SHAPES = {
    "Llama2-7B": Shape(4096, 32, 11008, 32, 32, 32000),
    "Llama2-13B": Shape(5120, 40, 13824, 40, 40, 32000),
    "Llama2-70B": Shape(8192, 80, 28672, 64, 8, 32000),
    "Llama3-8B": Shape(4096, 32, 14336, 32, 8, 128256),
    "Qwen2.5-7B": Shape(3584, 28, 18944, 28, 4, 152064),
    "Qwen2.5-7B-Instruct": Shape(3584, 28, 18944, 28, 4, 152064),
    "Qwen2.5-14B": Shape(5120, 48, 13824, 40, 8, 152064),
    "Qwen3-30B-A3B": Shape(2048, 48, 768, 32, 4, 151936, experts=128),
}


def sizes(model: str, local: str | None, schemes: Collection[str], nsamples: int, seqlen: int) -> str:
    """Estimates in GB: the 16-bit weights, each checkpoint, and the hidden states that calibration keeps."""
    shape = Shape.read(local) if local else SHAPES[model]
    weights = 2 * (shape.linear_weights + shape.other_weights) / 1e9
    checkpoints = []
    for scheme in schemes:
        bits = int(scheme[1 : scheme.index("A")])
        held = (shape.linear_weights * bits / 8 + shape.other_weights * 2) / 1e9
        checkpoints.append(f"{scheme} {held:.3g} GB")
    states = 2 * nsamples * seqlen * shape.hidden * 4 / 1e9
    where = "here already" if local else "to download"
    made = f"checkpoints: {', '.join(checkpoints)}" if checkpoints else "no checkpoint"
    return f"16-bit weights {weights:.3g} GB, {where}; {made}; hidden states in calibration {states:.3g} GB"


def comparison(
    printed: list[Entry], ours: dict[tuple[str, str, str], dict[str, float]], own_methods: Collection[str]
) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table per table and model of the paper: title, headings, lines.

    Args:
        ours: (model, scheme, method) -> column -> figure.
        own_methods: those that are not in the paper, set below its methods of the same scheme.
    """
    tables = []
    for number, model in dict.fromkeys((each.table, each.model) for each in printed):
        of_table = [each for each in printed if (each.table, each.model) == (number, model)]
        columns = list(dict.fromkeys(each.column for each in of_table))
        lines = []
        for scheme in dict.fromkeys(each.scheme for each in of_table):
            of_scheme = [each for each in of_table if each.scheme == scheme]
            for method in dict.fromkeys(each.method for each in of_scheme):
                row = {each.column: each for each in of_scheme if each.method == method}
                here = with_average(ours.get((model, scheme, method), {}), columns)
                name = "16-bit" if method == "-" else method
                lines.append([scheme, name, "paper", *(row[column].printed for column in columns)])
                if here:
                    lines.append([scheme, name, "here", *(figure(here.get(column)) for column in columns)])
                    apart = [difference(here.get(column), row[column].value) for column in columns]
                    lines.append([scheme, name, "difference", *apart])
            for method in own_methods:
                if here := with_average(ours.get((model, scheme, method), {}), columns):
                    lines.append([scheme, method, "here", *(figure(here.get(column)) for column in columns)])
        tables.append((f"Table {number}: {model}", ["bits", "method", "from", *columns], lines))
    return tables


def with_average(figures: dict[str, float], columns: list[str]) -> dict[str, float]:
    """Figures of the columns, and the mean of a table's tasks where all of them are known."""
    found = {column: figures[column] for column in columns if column in figures}
    tasks = [column for column in columns if column not in (*TEXTS, "Avg")]
    if "Avg" in columns and all(task in found for task in tasks):
        found["Avg"] = sum(found[task] for task in tasks) / len(tasks)
    return found


def figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}".replace("e+0", "e")


def difference(here: float | None, paper: float | None) -> str:
    if here is None or paper is None:
        return "-"
    return f"{here - paper:+.2f}" if max(here, paper) < 1000 else f"{here / paper:.2g}x"


def markdown(tables, budget: str, reasons: list[str], notes: list[str]) -> str:
    parts = [
        "# SliderQuant's tables",
        f"{datetime.now(UTC):%Y-%m-%d}, {budget}. The paper's figures are those of arXiv 2603.25284v1; difference is "
        'ours minus the paper\'s, less is better for WikiText2 and C4, more for the others. "-": no figure.',
    ]
    for title, headings, lines in tables:
        parts += [f"## {title}", markdown_table(headings, lines, words=3)]
    if reasons:
        parts += ["## Not measured", "\n".join(f"- {reason}" for reason in reasons)]
    return "\n\n".join([*parts, "## Notes", "\n".join(f"- {note}" for note in notes)]) + "\n"
