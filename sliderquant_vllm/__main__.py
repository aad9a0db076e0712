"""Check checkpoints: ``python -m sliderquant_vllm DIR [DIR ...]``."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict

from rich.console import Console
from rich.table import Table

from sliderquant_vllm.checkpoint import Linear, Summary, validate_checkpoint
from sliderquant_vllm.format import FormatError


def summary_table(directory: str, summary: Summary) -> Table:
    """One row per scheme: number of linears, their bytes, and bits per weight with scales and zero points."""
    by_scheme: dict[str, list[Linear]] = defaultdict(list)
    for linear in summary.linears.values():
        by_scheme[str(linear.scheme)].append(linear)
    table = Table(title=directory, title_justify="left")
    table.add_column("scheme")
    for heading in ("linears", "weights", "MB", "bits per weight"):
        table.add_column(heading, justify="right")
    for scheme, linears in sorted(by_scheme.items()):
        weights = sum(linear.out_features * linear.in_features for linear in linears)
        nbytes = sum(linear.nbytes for linear in linears)
        table.add_row(scheme, str(len(linears)), f"{weights:,}", f"{nbytes / 1e6:,.2f}", f"{8 * nbytes / weights:.3f}")
    quantized = sum(linear.nbytes for linear in summary.linears.values())
    table.add_row("not quantized", "", "", f"{(summary.nbytes - quantized) / 1e6:,.2f}", "")
    return table


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when every directory is valid, else 2, with one line on stderr for each that is not."""
    parser = argparse.ArgumentParser(prog="python -m sliderquant_vllm", description=__doc__)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a quantized checkpoint")
    status = 0
    for directory in parser.parse_args(argv).directories:
        try:
            summary = validate_checkpoint(directory, data=True)
        except FormatError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        else:
            Console().print(summary_table(directory, summary))
    return status


if __name__ == "__main__":
    sys.exit(main())
