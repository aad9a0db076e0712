import threading
from types import SimpleNamespace

import pytest

from benchmarks.kernels import MODELS, draw, fraction, parse, peaks
from sliderquant_vllm import ops


def row(op: str, kind: str, m: int, ms: float) -> dict:
    """A weight of 8 MB, read by a machine of 40 GB/s in 0.2 ms."""
    limits = {"read_gb_per_s": 40.0, "bf16_gop_per_s": 500.0, "int8_gop_per_s": 1000.0}
    moved = 8e6 / (ms * 1e-3) / 1e9
    return (
        {"op": op, "kind": kind, "n": 4096, "k": 4096, "m": m, "ms": ms, "gb_per_s": moved}
        | limits
        | {"operations": 2 * m * 4096 * 4096}
    )


@pytest.mark.parametrize(
    ("kind", "m", "ms", "expected"),
    [("bf16", 1, 0.25, 0.8), ("bf16", 256, 20.0, 0.859), ("int8", 256, 10.0, 0.859), ("int8", 256, 20.0, 0.4295)],
)
def test_a_share_is_that_of_the_tighter_limit(kind, m, ms, expected):
    assert fraction(row("ours", kind, m, ms)) == pytest.approx(expected, rel=1e-3)


def test_without_a_measured_peak_memory_is_the_limit():
    measured = row("ours", "bf16", 256, 20.0)
    del measured["bf16_gop_per_s"]
    assert fraction(measured) == pytest.approx(0.01)


def test_shapes_are_those_of_models_or_any():
    assert parse(["--shapes", "64x128", "qwen2.5-7b"]).shapes == [(64, 128), *MODELS["qwen2.5-7b"]]
    assert parse([]).shapes == MODELS["llama3-8b"]


@pytest.mark.parametrize(("text", "words"), [("llama", "one of llama3-8b"), ("4096x100", "K of 128")])
def test_other_shapes_are_refused(capsys, text, words):
    with pytest.raises(SystemExit):
        parse(["--shapes", text])
    assert words in capsys.readouterr().err


def test_rooflines_are_drawn(tmp_path):
    rows = [
        row(op, kind, m, 0.3 * m) for op, kind in (("sliderquant W4A16", "bf16"), ("W8A8", "int8")) for m in (1, 16)
    ]
    draw([{"threads": 1, "rows": rows}, {"threads": 2, "rows": rows}], tmp_path / "roofs.png")
    assert (tmp_path / "roofs.png").stat().st_size > 10_000


def test_peaks_are_those_of_all_threads(monkeypatch):
    together = threading.Barrier(3, timeout=60)

    def peak(kind: str, seconds: float) -> float:
        together.wait()
        return {"bf16": 2e9, "int8": 5e9}[kind]

    monkeypatch.setattr(ops, "host", lambda: SimpleNamespace(peak=peak))
    assert peaks(3) == {"bf16_gop_per_s": 6.0, "int8_gop_per_s": 15.0}


def test_a_thread_multiplies_bytes_faster():
    if ops.host().isa() not in ("amx", "avx512", "avx2"):
        assert peaks(1) == {}
        return
    tries = [peaks(1) for _ in range(5)]  # neighbours may slow one of the two down
    int8, bf16 = (max(one[f"{kind}_gop_per_s"] for one in tries) for kind in ("int8", "bf16"))
    assert int8 > 1.2 * bf16 > 0
    with pytest.raises(ValueError, match="expected bf16 or int8"):
        ops.host().peak("fp64", 0.01)
