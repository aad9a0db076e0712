"""The instruction wrappers of the CUDA kernels: their host versions against a model, the machine code that they become,
and, where there is a GPU, what it computes. Also the runner that stands in for a GPU: it must see errors."""

from __future__ import annotations

import ctypes
import itertools
import re

import pytest
import torch

from tests.cuda import ROOT, build_emulator, call, compile_cuda, instructions, known_archs, needs_nvcc

SEEDS = range(5)
# Names of ptx_bodies.cuh, and the start of an instruction that each must become, as a regular expression.
BODIES = {
    "mma_bf16": "HMMA.16816.F32.BF16",
    "mma_fp16": "HMMA.16816.F32",
    "mma_s8s8": "IMMA.16832.S8.S8",
    "mma_s8u8": "IMMA.16832.S8.U8",
    "mma_u8s8": "IMMA.16832.U8.S8",
    "mma_u8u8": "IMMA.16832.U8.U8",
    "ldmatrix": "LDSM.16.M88.4",
    "cp_async": "LDGSTS.E.BYPASS",
    "integers": "SHFL.BFLY",
    "add2_bf16": "(HFMA2|HADD2).BF16",
    "add2_fp16": "HADD2",
    "atomics": "ATOMG",
    "convert_bf16": r"F2FP\.BF16",
    "convert_fp16": r"F2FP\.(F16|PACK)",
}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    library = build_emulator("emulate_ptx", tmp_path_factory.mktemp("emulator"))
    library.run_ptx.restype = library.run_faulty.restype = ctypes.c_char_p
    library.share_of_copies_seen.restype = ctypes.c_double
    return library


def place(emulator, operand: str, bits: int, lane: int, i: int) -> tuple[int, int]:
    row, column = ctypes.c_int64(), ctypes.c_int64()
    arguments = (["a", "b", "c", "matrix"].index(operand), bits, lane, i)
    emulator.fragment_place(*map(ctypes.c_int64, arguments), ctypes.byref(row), ctypes.byref(column))
    return row.value, column.value


@pytest.mark.parametrize("bits", [16, 8])
def test_fragments_are_those_of_the_ptx_manual(emulator, bits):
    """The formulas of "Matrix Fragments for mma.m16n8k16" (16-bit types) and "mma.m16n8k32" (8-bit integers)."""
    per, depth = 32 // bits, 8 * 32 // bits
    found = {"a": [], "b": [], "c": []}
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4 * per):
            row = group if i // per in (0, 2) else group + 8
            column = thread * per + i % per + (depth // 2 if i >= 2 * per else 0)
            found["a"].append(place(emulator, "a", bits, lane, i))
            assert found["a"][-1] == (row, column)
        for i in range(2 * per):
            row = thread * per + i % per + (depth // 2 if i >= per else 0)
            found["b"].append(place(emulator, "b", bits, lane, i))
            assert found["b"][-1] == (row, group)
        for i in range(4):
            found["c"].append(place(emulator, "c", bits, lane, i))
            assert found["c"][-1] == (group + (8 if i >= 2 else 0), thread * 2 + (i & 1))
        for i in range(2):
            assert place(emulator, "matrix", 16, lane, i) == (group, thread * 2 + i)
    for operand, shape in (("a", (16, depth)), ("b", (depth, 8)), ("c", (16, 8))):
        assert sorted(found[operand]) == list(itertools.product(*map(range, shape))), operand


@pytest.mark.parametrize(
    ("operand", "bits", "lane", "i", "expected"),
    [
        ("a", 16, 0, 2, (8, 0)),
        ("a", 16, 5, 5, (1, 11)),
        ("a", 16, 31, 7, (15, 15)),
        ("b", 16, 6, 2, (12, 1)),
        ("a", 8, 1, 4, (8, 4)),
        ("a", 8, 2, 9, (0, 25)),
        ("b", 8, 31, 7, (31, 7)),
        ("c", 16, 9, 3, (10, 3)),
    ],
)
def test_fragment_golden(emulator, operand, bits, lane, i, expected):
    assert place(emulator, operand, bits, lane, i) == expected


def operands(name: str, seed: int) -> list[torch.Tensor]:
    """a [32, 4], b [32, 2], c [32, 4] int32 for one body: numbers of its type, exact in every order of summation."""
    generator = torch.Generator().manual_seed(seed)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)

    def halves(*shape: int) -> torch.Tensor:
        dtype = torch.bfloat16 if "bf16" in name else torch.float16
        values = torch.randint(-96, 97, (*shape[:-1], 2 * shape[-1]), generator=generator) / 8
        return values.to(dtype).view(torch.int32)

    if name.startswith(("add2", "convert")):
        return [halves(32, 4), words(32, 2), halves(32, 4)]
    if name in ("mma_bf16", "mma_fp16"):
        return [halves(32, 4), halves(32, 2), (torch.randint(-99, 99, (32, 4)) / 4).float().view(torch.int32)]
    return [words(32, 4), words(32, 2), words(32, 4)]


def matrix(emulator, registers: torch.Tensor, operand: str, dtype: torch.dtype, rows: int, columns: int):
    """The float64 matrix that lanes hold in registers."""
    values = registers.view(dtype)
    bits = 16 if operand == "c" else 8 * dtype.itemsize
    full = torch.zeros(rows, columns, dtype=torch.float64)
    for lane, i in itertools.product(range(32), range(values.shape[1])):
        full[place(emulator, operand, bits, lane, i)] = values[lane, i].double()
    return full


def expected_product(emulator, name: str, a, b, c) -> torch.Tensor:
    types = {"s8": torch.int8, "u8": torch.uint8, "bf16": torch.bfloat16, "fp16": torch.float16}
    kind = name.removeprefix("mma_")
    type_a, type_b = (types[kind], types[kind]) if kind in types else (types[kind[:2]], types[kind[2:]])
    sums = torch.float32 if kind in types else torch.int32
    depth = 32 if sums == torch.int32 else 16
    exact = matrix(emulator, a, "a", type_a, 16, depth) @ matrix(emulator, b, "b", type_b, depth, 8)
    exact += matrix(emulator, c, "c", sums, 16, 8)
    d = torch.empty(32, 4, dtype=sums)
    for lane, i in itertools.product(range(32), range(4)):
        value = exact[place(emulator, "c", 16, lane, i)]
        # Sums of 32 bits wrap; the given ones take the whole range.
        d[lane, i] = value if sums == torch.float32 else (int(value) + 2**31) % 2**32 - 2**31
    return d.view(torch.int32)


def expected(emulator, name: str, a, b, c) -> torch.Tensor:
    if name.startswith("mma"):
        return expected_product(emulator, name, a, b, c)
    if name.startswith("add2"):
        dtype = torch.bfloat16 if name == "add2_bf16" else torch.float16
        return (a.view(dtype) + c.view(dtype)).view(torch.int32)
    if name.startswith("convert"):
        dtype = torch.bfloat16 if name == "convert_bf16" else torch.float16
        return (a.view(dtype).float() * torch.tensor([1.0009765625, 0.5]).repeat(4)).to(dtype).view(torch.int32)
    lanes = torch.arange(32)
    if name == "cp_async":
        second = torch.where((lanes % 2 == 0)[:, None], c, torch.zeros_like(c))
        return (a ^ second).flip(0)
    if name == "atomics":
        d = torch.zeros(128, dtype=torch.int32)
        d[0], d[1] = 32, torch.tensor(float(sum(range(32)))).view(torch.int32)
        return d.view(32, 4)
    if name == "ldmatrix":
        # Lane l reads row l / 4 of each of the four matrices, whose rows are those that lanes 8 r to 8 r + 7 name.
        return torch.stack([a.view(4, 8, 4)[r, lanes // 4, lanes % 4] for r in range(4)], 1)
    selected = torch.cat([a[:, :1], a[:, 1:2]], 1).view(torch.uint8)[:, [5, 1, 7, 3]].contiguous().view(torch.int32)
    return torch.stack(
        [a[(lanes * 5 + 3) % 32, 0], a[lanes ^ 9, 1], a[:, 0] & a[:, 1] | a[:, 2], selected[:, 0]],
        1,
    )


def check(emulator, library, name: str, seed: int) -> None:
    given, d = operands(name, seed), torch.empty(32, 4, dtype=torch.int32)
    assert call(library.run_ptx, name, *given, d, seed) == ""
    assert torch.equal(d, expected(emulator, name, *given)), name


@pytest.mark.parametrize("name", BODIES)
def test_host_versions_compute_what_the_instruction_does(emulator, name):
    for seed in SEEDS:
        check(emulator, emulator, name, seed)


@needs_nvcc
@pytest.mark.parametrize("arch", known_archs())
def test_wrappers_become_their_instruction(arch, tmp_path):
    library = tmp_path / "check_ptx.so"
    compile_cuda(ROOT / "tests" / "check_ptx.cu", library, arch, "-shared")
    found = instructions(library, arch)
    for name, instruction in BODIES.items():
        assert any(re.match(instruction, one) for one in found), (name, instruction, sorted(found))


@needs_nvcc
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_a_gpu_computes_the_same(emulator, tmp_path):
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    library = tmp_path / "check_ptx.so"
    compile_cuda(ROOT / "tests" / "check_ptx.cu", library, arch, "-shared")
    device = ctypes.CDLL(str(library))
    device.run_ptx.restype = ctypes.c_char_p
    for name, seed in itertools.product(BODIES, SEEDS):
        check(emulator, device, name, seed)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diverges_at_a_barrier", "waits forever at sync_threads; 1 of 64 threads have ended"),
        ("leaves_a_warp", "waits forever at shuffle_xor; 2 of 64 threads have ended"),
        ("disagrees", "while others of its warp are at"),
        ("reads_outside", "read of 4 bytes"),
        ("writes_what_it_may_read", "write of 4 bytes"),
        ("copies_unaligned", "unaligned address"),
        ("overflows_shared", "wrote beyond its 1024 bytes of shared memory"),
    ],
)
def test_the_runner_sees_errors(emulator, name, message):
    for seed in SEEDS:
        found = call(emulator.run_faulty, name, seed)
        assert message in found and f"(seed {seed})" in found


def test_copies_without_a_wait_are_seen_half_of_the_time(emulator):
    def mean(waits: int) -> float:
        return (
            sum(emulator.share_of_copies_seen(ctypes.c_int64(waits), ctypes.c_int64(seed)) for seed in range(50)) / 50
        )

    assert mean(1) == 1 and 0.4 < mean(0) < 0.6


def test_threads_take_turns_in_a_seeded_random_order(emulator):
    def order(seed: int) -> list[int]:
        found = (ctypes.c_int64 * 64)()
        emulator.order_of_threads(ctypes.c_int64(seed), found)
        return list(found)

    assert sorted(order(1)) == list(range(64)) and order(1) == order(1)
    assert order(1) != order(2) and order(1) != list(range(64))
