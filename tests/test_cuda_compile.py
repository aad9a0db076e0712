"""The CUDA kernels compile for every architecture, into machine code that holds what is meant and does not spill."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterable

import pytest

from tests.cuda import (
    BUILT_ARCHS,
    ROOT,
    compile_cuda,
    find_cuobjdump,
    instructions,
    known_archs,
    needs_nvcc,
)
from tests.native import LIBRARY

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


# Of each source, instructions that the machine code must hold: tensor cores, asynchronous copies past the registers,
# whole vectors of a row. On sm_90a launch_sm90.cu has products of warpgroups that read A from registers, and bulk
# copies, to a cluster too.
TENSOR_CORES = ("HMMA.16816.F32", "HMMA.16816.F32.BF16", "IMMA.16832.U8.U8", "LDGSTS.E.BYPASS")
HELD = {
    "launch.cu": TENSOR_CORES,
    "launch_grouped.cu": TENSOR_CORES,
    "launch_rows.cu": ("LDG.E.128", "STG.E.64", "STG.E.128", "SHFL.BFLY"),
    "launch_sm90.cu": (
        "HGMMA.64x64x16.F32.BF16", "HGMMA.64x128x16.F32.BF16", "HGMMA.64x64x16.F32", "HGMMA.64x128x16.F32",
        "IGMMA.64x64x32.U8.U8", "IGMMA.64x128x32.U8.U8", "UBLKCP", "USETMAXREG", "MOVM",
    ),
}  # fmt: skip


# Products of four bits, which sm_90 has not, nvcc makes of hundreds of other instructions.
SLOW_PRODUCT = b"__cuda_sm_9x_mma_sub_byte"
needs_kernels = pytest.mark.skipif(
    os.environ.get("SLIDERQUANT_CUDA") == "0", reason="SLIDERQUANT_CUDA=0: this library was built without CUDA kernels"
)


def check_held(sources: Iterable[str], found: set[str]) -> None:
    for instruction in itertools.chain.from_iterable(HELD[source] for source in sources):
        assert any(one.startswith(instruction) for one in found), (instruction, sorted(found))


@needs_nvcc
@pytest.mark.parametrize("arch", [arch for arch in known_archs() if arch not in BUILT_ARCHS])
def test_compiles_without_spills(arch, tmp_path):
    """Architectures beyond those that the library is built for."""
    assert {source.name for source in SOURCES} == set(HELD)
    for source in SOURCES:
        target = tmp_path / "kernels.o"
        compile_cuda(source, target, arch, "-c")
        if source.name != "launch_sm90.cu":
            check_held([source.name], instructions(target, arch))
        assert SLOW_PRODUCT not in target.read_bytes()


@needs_nvcc
@needs_kernels
@pytest.mark.parametrize("arch", BUILT_ARCHS)
def test_library_has_no_spills(arch):
    command = [find_cuobjdump(), "-res-usage", "-arch", f"sm_{arch}", str(LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    assert len(kernels) > 100
    assert [kernel for kernel in kernels if kernel[2:] != ("0", "0")] == []
    if arch == "90a":
        # The third warpgroup keeps 40 and the others take 232 each: of fewer they would wait forever.
        assert {registers for name, registers, *_ in kernels if "run_sm90" in name} == {"168"}
    check_held(HELD if arch == "90a" else HELD.keys() - {"launch_sm90.cu"}, instructions(LIBRARY, arch))
    assert SLOW_PRODUCT not in LIBRARY.read_bytes()


@needs_nvcc
def test_products_of_warpgroups_run_side_by_side(tmp_path):
    """ptxas may let them run one by one, or ignore how registers are shared out, and says so."""
    report = compile_cuda(ROOT / "csrc" / "cuda" / "launch_sm90.cu", tmp_path / "kernels.o", "90a", "-c")
    assert "Potential Performance Loss" not in report and "setmaxnreg" not in report, report


@needs_nvcc
def test_no_cuda_source_includes_torch():
    for path in (ROOT / "csrc" / "cuda").iterdir():
        assert not re.search(r"#include.*(torch|ATen|c10)/", path.read_text()), path


@needs_nvcc
@needs_kernels
def test_library_holds_every_architecture():
    def held(kind: str, suffix: str) -> set[str]:
        command = [find_cuobjdump(), f"--list-{kind}", str(LIBRARY)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return set(re.findall(rf"\.sm_(\w+)\.{suffix}", listing))

    assert held("elf", "cubin") >= set(BUILT_ARCHS)
    assert "80" in held("ptx", "ptx")  # for GPUs that are newer
