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
# The same of ptx_sm90_bodies.cuh.
SM90_BODIES = {
    "product_bf16_64": "HGMMA.64x64x16.F32.BF16",
    "product_bf16_96": "HGMMA.64x96x16.F32.BF16",
    "product_bf16_128": "HGMMA.64x128x16.F32.BF16",
    "product_fp16_64": "HGMMA.64x64x16.F32$",
    "product_fp16_96": "HGMMA.64x96x16.F32$",
    "product_fp16_128": "HGMMA.64x128x16.F32$",
    "product_byte_64": "IGMMA.64x64x32.U8.U8",
    "product_byte_96": "IGMMA.64x96x32.U8.U8",
    "product_byte_128": "IGMMA.64x128x32.U8.U8",
    "cluster": "UBLKCP.*MULTICAST",
    "registers_bf16": "(HFMA2|HMUL2)(.MMA)?.BF16",
    "registers_fp16": "MOVM.16.MT88",
}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    library = build_emulator("emulate_ptx", tmp_path_factory.mktemp("emulator"))
    for name in ("run_ptx", "run_ptx_sm90", "run_faulty", "run_faulty_product"):
        getattr(library, name).restype = ctypes.c_char_p
    library.share_of_copies_seen.restype = library.share_of_products_right.restype = ctypes.c_double
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


def words(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)


def halves(generator: torch.Generator, name: str, *shape: int) -> torch.Tensor:
    dtype = torch.bfloat16 if "bf16" in name else torch.float16
    values = torch.randint(-96, 97, (*shape[:-1], 2 * shape[-1]), generator=generator) / 8
    return values.to(dtype).view(torch.int32)


def operands(name: str, seed: int) -> list[torch.Tensor]:
    """a [32, 4], b [32, 2], c [32, 4] int32 for one body: numbers of its type, exact in every order of summation."""
    generator = torch.Generator().manual_seed(seed)
    if name.startswith(("add2", "convert")):
        return [halves(generator, name, 32, 4), words(generator, 32, 2), halves(generator, name, 32, 4)]
    if name in ("mma_bf16", "mma_fp16"):
        floats = torch.randint(-99, 99, (32, 4), generator=generator) / 4
        return [halves(generator, name, 32, 4), halves(generator, name, 32, 2), floats.float().view(torch.int32)]
    return [words(generator, 32, 4), words(generator, 32, 2), words(generator, 32, 4)]


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


@pytest.mark.parametrize("bits", [16, 8])
def test_fragments_of_warpgroups_are_those_of_the_ptx_manual(emulator, bits):
    """The formulas of "Register Fragments" of wgmma.m64nNk16 and .m64nNk32: a warp holds 16 rows of A as for mma, and
    of D eight columns after eight columns."""
    per = 32 // bits
    for warp, lane in itertools.product(range(4), range(32)):
        for i in range(4 * per):
            register = i // per
            row = 16 * warp + lane // 4 + (8 if register % 2 else 0)
            column = lane % 4 * per + i % per + (4 * per if register >= 2 else 0)
            found = place(emulator, "a", bits, lane, i)
            assert (16 * warp + found[0], found[1]) == (row, column)
        for i in range(64):
            row = 16 * warp + lane // 4 + (8 if i % 4 >= 2 else 0)
            column = 8 * (i // 4) + lane % 4 * 2 + i % 2
            found = place(emulator, "c", 16, lane, i % 4)
            assert (16 * warp + found[0], 8 * (i // 4) + found[1]) == (row, column)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (0, 0),
        (16, 16),
        (128, 144),
        (128 + 16, 128),
        (3 * 128 + 5, 3 * 128 + 48 + 5),
        (7 * 128 + 112, 7 * 128),
        (1024, 1024),
    ],
)
def test_swizzle_golden(emulator, offset, expected):
    """128-byte swizzle: bits 4 to 6 of an address, exclusive or bits 7 to 9."""
    emulator.swizzled_place.restype = ctypes.c_int64
    assert emulator.swizzled_place(ctypes.c_int64(offset)) == expected
    assert expected == offset ^ (offset >> 7 & 7) << 4


def test_descriptor_golden(emulator):
    """Start address, leading and stride byte offset in units of 16 bytes at bits 0, 16 and 32; swizzle 1 at bit 62."""
    emulator.descriptor.restype = ctypes.c_uint64
    found = emulator.descriptor(ctypes.c_int64(0x12C00), ctypes.c_int64(96))
    assert found == (0x12C00 + 96) // 16 | 1 << 16 | 1024 // 16 << 32 | 1 << 62


def sm90_operands(name: str, seed: int) -> list[torch.Tensor]:
    """a [128, 4], b [128, 8], c [128, 64] int32 for one body for sm_90a."""
    generator = torch.Generator().manual_seed(seed)
    if name.startswith("product_byte") or name == "cluster":
        return [words(generator, 128, 4), words(generator, 128, 8), words(generator, 128, 64)]
    floats = torch.randint(-99, 99, (128, 64), generator=generator) / 4
    return [halves(generator, name, 128, 4), halves(generator, name, 128, 8), floats.float().view(torch.int32)]


def expected_sm90(emulator, name: str, a, b, c) -> torch.Tensor:
    d = torch.full((2, 128, 64), -1, dtype=torch.int32)
    if name == "cluster":
        d[:, :, :4] = a.flip(0) ^ b.view(-1, 4)[torch.arange(128) // 2, :1]
    elif name.startswith("registers"):
        dtype = torch.bfloat16 if name == "registers_bf16" else torch.float16
        for warp in range(4):
            rows = slice(32 * warp, 32 * warp + 32)
            square = a[rows, 0].clone().view(dtype).view(8, 8)
            d[:, rows, 0] = square.T.contiguous().view(torch.int32).flatten()
        d[:, :, 1] = c[:, :2].contiguous().view(torch.float32).to(dtype).view(torch.int32)[:, 0]
        value, high, low = (a[:, i].contiguous().view(dtype) for i in (1, 2, 3))
        rest = (value.double() * low.double()).to(dtype)
        d[:, :, 2] = (value.double() * high.double() + rest.double()).to(dtype).view(torch.int32)
    else:
        kind, tokens = name.split("_")[1], int(name.split("_")[2])
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "byte": torch.uint8}[kind]
        sums = torch.int32 if kind == "byte" else torch.float32
        depth = 32 if kind == "byte" else 16
        columns = b.view(dtype)[:tokens].double()
        for warp in range(4):
            rows = slice(32 * warp, 32 * warp + 32)
            exact = 2 * matrix(emulator, a[rows].contiguous(), "a", dtype, 16, depth) @ columns.T
            before = c[rows].contiguous().view(sums)
            for lane, i in itertools.product(range(32), range(tokens // 2)):
                row, column = place(emulator, "c", 16, lane, i % 4)
                value = exact[row, 8 * (i // 4) + column] + before[lane, i].double()
                if sums == torch.int32:
                    d[:, 32 * warp + lane, i] = (int(value) + 2**31) % 2**32 - 2**31
                else:
                    d[:, 32 * warp + lane, i] = value.float().view(torch.int32)
    return d


def check_sm90(emulator, library, name: str, seed: int) -> None:
    given, d = sm90_operands(name, seed), torch.full((2, 128, 64), -1, dtype=torch.int32)
    assert call(library.run_ptx_sm90, name, *given, d, seed) == ""
    assert torch.equal(d, expected_sm90(emulator, name, *given)), name


@pytest.mark.parametrize("name", SM90_BODIES)
def test_host_versions_for_sm90_compute_what_the_instruction_does(emulator, name):
    for seed in range(2):
        check_sm90(emulator, emulator, name, seed)


@needs_nvcc
@pytest.mark.parametrize("arch", known_archs())
def test_wrappers_become_their_instruction(arch, tmp_path):
    library = tmp_path / "check_ptx.so"
    compile_cuda(ROOT / "tests" / "check_ptx.cu", library, arch, "-shared")
    found = instructions(library, arch)
    for name, instruction in (BODIES | (SM90_BODIES if arch == "90a" else {})).items():
        assert any(re.match(instruction, one) for one in found), (name, instruction, sorted(found))


@needs_nvcc
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_a_gpu_computes_the_same(emulator, tmp_path):
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    arch += "a" if arch == "90" else ""
    library = tmp_path / "check_ptx.so"
    compile_cuda(ROOT / "tests" / "check_ptx.cu", library, arch, "-shared")
    device = ctypes.CDLL(str(library))
    device.run_ptx.restype = device.run_ptx_sm90.restype = ctypes.c_char_p
    for name, seed in itertools.product(BODIES, SEEDS):
        check(emulator, device, name, seed)
    for name, seed in itertools.product(SM90_BODIES if arch == "90a" else (), SEEDS):
        check_sm90(emulator, device, name, seed)


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", ""),
        ("unfenced", "a product without a product_fence since the last commit"),
        ("ordinary_write", "which no bulk copy wrote last"),
        ("unwaited", "ended without a wait for its products"),
        ("other_b", "a product of another B than that of its warpgroup"),
        ("unfenced_barrier", "a barrier that is none yet, or was not fenced"),
        ("unaligned_copy", "bytes at the unaligned byte 8 of shared memory"),
    ],
)
def test_the_runner_sees_errors_of_products(emulator, name, message):
    for seed in SEEDS:
        found = call(emulator.run_faulty_product, name, seed)
        assert message in found and (message != "") == (found != "")


@pytest.mark.parametrize("early", [0, 1], ids=["an operand that changes", "sums that are read"])
def test_registers_of_a_running_product_are_seen_half_of_the_time(emulator, early):
    right = [emulator.share_of_products_right(ctypes.c_int64(early), ctypes.c_int64(seed)) for seed in range(40)]
    assert 0.3 < sum(right) / len(right) < 0.7


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
