"""What the kernels for tensor cores should take on a GPU, from its bytes, instructions and occupancy.

A model, to be compared with what is measured and never to be quoted instead of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sliderquant_vllm import ops


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU by its data sheet, unless a comment says otherwise."""

    name: str
    arch: int
    processors: int
    clock: float  # Hz, under load
    memory: float  # bytes/s
    l2: float  # bytes/s; microbenchmarks of others
    mma_cycles: float  # of one mma.m16n8k16, or m16n8k32 of bytes, in a quarter of an SM; on sm_90 62% of wgmma's rate
    launch: float  # s from one kernel of a CUDA graph to the next, and until its pipelines are full; a guess


H200 = Machine("H200", 90, 132, 1.755e9, 4.8e12, 5.5e12, 6.5, 3e-6)
REDUCE_LAUNCH = 2e-6  # s of the second kernel, which finds everything in L2; a guess
MEMORY_SHARE = 0.92  # of the data sheet's bandwidth that a long copy reaches
L2_BYTES = 50 << 20
QUARTERS = 4  # of an SM, each of which issues one instruction of a warp per cycle
SHARED_BYTES = 128  # that an SM reads of its shared memory per cycle
QUANTIZE_LAUNCH = 2e-6  # s of the kernel that quantizes the tokens, which find themselves in L2; a guess
# Of the kernels of rows.cuh per value: bytes, and instructions as far as the source tells; a butterfly takes two more.
ROW_BYTES = {"quantize": 2 + 1, "rms_norm": 2 + 2 + 2 + 1, "silu_mul": 2 + 2 + 1}
ROW_INSTRUCTIONS = {"quantize": 18, "rms_norm": 26, "silu_mul": 45}
ARRANGE_LAUNCH = 2e-6  # s of the kernel that makes the image of the tokens, which find themselves in L2; a guess
WGMMA_MACS = {2: 2048, 1: 4096}  # per cycle of an SM, by the bytes of an element of x; the data sheet's rate
OVERHEAD = 100  # instructions per chunk: copies, addresses, scales, the loop; counted in the machine code of sm_90a
INTEGER_OVERHEAD = 60  # the same of the integer product
# Instructions of the kernels for sm_90a, per warp: of a chunk, of a group of a chunk, and of the 128 outputs per lane
# that a share of 128 tokens ends with, of which half is taken to be hidden behind the other warpgroup's products
SM90_OVERHEAD = {2: 88, 1: 66}
SM90_GROUP = 50
SM90_FINISH = {2: 800, 1: 2000}
SM90_HIDDEN = 0.5


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that each resource is busy, were it alone; the slowest one and the launches are the time of the op.

    ``launches`` counts the kernels before and behind the product too.
    """

    memory: float
    l2: float
    issue: float
    tensor: float
    launches: float
    blocks: int
    splits: int
    blocks_per_processor: int
    shared: float = 0

    @property
    def total(self) -> float:
        return getattr(self, self.limit) + self.launches

    @property
    def limit(self) -> str:
        return max(("memory", "l2", "issue", "tensor", "shared"), key=lambda name: getattr(self, name))


def expand_instructions(bits: int, fp16: bool) -> int:
    """Of a warp for the pairs of 32 channels x 128 k, as expand.cuh says, per lane."""
    mantissa = 10 if fp16 else 7
    pairs = 64
    if bits > mantissa:
        return 5 * pairs
    places = max(1, min(4, mantissa // bits))
    shifts = -(-(16 // bits) // places) - 1  # of a word
    gather = 4 * 5 if bits == 3 else 0  # the sixteenth pair
    return 2 * pairs + 4 * bits * shifts + gather


def chunk_instructions(bits: int, fp16: bool, tiles: int, groups: int, asymmetric: bool) -> float:
    """Of a warp for 32 channels x 128 k, as expand.cuh and sm80_wna16.cuh say, per lane."""
    mantissa = 10 if fp16 else 7
    places = max(1, min(4, mantissa // bits))
    expand = expand_instructions(bits, fp16)
    products = 16 * tiles
    reads = 4 * tiles + bits
    offsets = groups * asymmetric * (5 + 4 * places)
    add_group = groups * (4 + 12 * tiles)
    return expand + products + reads + offsets + add_group + OVERHEAD


def wna16_cost(
    machine: Machine, m: int, n: int, k: int, bits: int, group_size: int, asymmetric: bool, fp16: bool = False
) -> Cost:
    plan = ops.host().gpu.plan_wna16(m, n, k, bits, machine.arch, machine.processors)
    tiles, splits, blocks = plan["tokens"] // 8, plan["splits"], plan["blocks"]
    groups = 1 if group_size == -1 else k // group_size
    weights = 4 * ops.host().gpu.packed_words(bits, n, k) + groups * n * (5 if asymmetric else 4)
    if plan["kernel"] == "sm90":
        instructions = expand_instructions(bits, fp16)
        if groups > 1:
            instructions += 2 * 64 + max(1, 128 // group_size) * SM90_GROUP
        return sm90_cost(machine, plan, m, n, k, weights, 2, instructions)
    chunks_of_block = -(-k // 128) / splits  # of 128 k
    x_reads = blocks * chunks_of_block * 128 * min(m, plan["tokens"]) * 2
    partial = 2 * 4 * splits * m * n if splits > 1 else 0
    token_tiles = -(-m // plan["tokens"])
    # Warp-chunks that the SM with the most blocks has to do, shared by its quarters.
    busiest = -(-blocks // machine.processors)
    warp_chunks = busiest * chunks_of_block * plan["channels"] / 32 / QUARTERS
    groups_of_chunk = 1 if group_size == -1 else max(1, 128 // group_size)
    instructions = chunk_instructions(bits, fp16, tiles, groups_of_chunk, asymmetric)
    return Cost(
        memory=(weights + 2 * m * (k + n)) / (machine.memory * MEMORY_SHARE),
        l2=(weights * token_tiles + x_reads + partial + 2 * m * n) / machine.l2,
        issue=warp_chunks * instructions / machine.clock,
        tensor=warp_chunks * 16 * tiles * machine.mma_cycles / machine.clock,
        launches=machine.launch + (REDUCE_LAUNCH if splits > 1 else 0),
        blocks=blocks,
        splits=splits,
        blocks_per_processor=min(plan["blocks_per_processor"], busiest),
    )


def sm90_cost(machine: Machine, plan: dict, m: int, n: int, k: int, weights: int, size: int, expansion: float) -> Cost:
    """Of the kernels for sm_90a, given the instructions that expand 32 channels x 128 k for a warp, and of making the
    image of the tokens before; with integers, of quantizing them before that."""
    tokens, splits, shares = plan["tokens"], plan["splits"], plan["blocks"]
    chunks = -(-k // 128) / splits
    busiest = -(-shares // machine.processors)
    image = m * k * size
    tile_weights = chunks * plan["channels"] * 128 * (weights / (n * k))
    x_reads = chunks * 128 * size * min(m, tokens)
    partial = 2 * 4 * splits * m * n if splits > 1 else 0
    # Two warps of a quarter, each with 32 channels.
    finish = SM90_FINISH[size] * tokens / 128
    issue = busiest * 2 * (chunks * (expansion + SM90_OVERHEAD[size]) + finish)
    macs = busiest * chunks * plan["channels"] * tokens * 128 / WGMMA_MACS[size]
    arranging = 2 * image / machine.l2 + ARRANGE_LAUNCH
    quantizing = m * k * (2 + 1) / machine.l2 + QUANTIZE_LAUNCH if size == 1 else 0
    return Cost(
        memory=(weights + image + 2 * m * n) / (machine.memory * MEMORY_SHARE),
        l2=(shares * (tile_weights + x_reads / plan["cluster"]) + partial + 2 * m * n) / machine.l2,
        issue=issue / machine.clock,
        tensor=(macs + busiest * 2 * finish * (1 - SM90_HIDDEN)) / machine.clock,
        launches=machine.launch + arranging + quantizing + (REDUCE_LAUNCH if splits > 1 else 0),
        blocks=shares,
        splits=splits,
        blocks_per_processor=1,
        shared=busiest
        * chunks
        * (128 * size * tokens * (1 + 2 * 2) + 2 * 128 * weights / n / k * 256)
        / SHARED_BYTES
        / machine.clock,
    )


QUAD_EXPANSION = {2: 16 + 12, 3: 32 + 22, 4: 16 + 8, 8: 0}  # by bits: masks and shifts of 16 registers


def quad_instructions(bits: int, panels: int, tiles: int) -> float:
    """Of a warp for its panels of 16 channels x 128 k, as expand.cuh and sm80_integer.cuh say, per lane."""
    expand = QUAD_EXPANSION[bits]
    vectors = {2: 1, 3: 3, 4: 2, 8: 4}[bits]
    return panels * (expand + vectors) + 4 * panels * tiles + 4 * tiles + INTEGER_OVERHEAD


def row_instructions(kind: str, block: int) -> float:
    """Per value, of quantizing it behind a layer and a Hadamard transform of so many values."""
    return ROW_INSTRUCTIONS[kind] + (2 * block.bit_length() if block > 1 else 0)


def row_cost(machine: Machine, m: int, k: int, kind: str, block: int = 1) -> float:
    """Seconds of one of the quantizers of rows.cuh, which finds few tokens in L2 and many in memory."""
    size = m * k * ROW_BYTES[kind]
    rate = machine.l2 if size < L2_BYTES / 2 else machine.memory * MEMORY_SHARE
    lanes = min(m * k / 8, machine.processors * QUARTERS * 32)  # a thread has 8 values at least
    return max(size / rate, m * k * row_instructions(kind, block) / (lanes * machine.clock)) + QUANTIZE_LAUNCH


def integer_cost(
    machine: Machine, m: int, n: int, k: int, bits: int, asymmetric: bool, kind: str = "quantize", block: int = 1
) -> Cost:
    """Of the integer product, and of quantizing its tokens before: alone, or with the layer in front of it."""
    plan = ops.host().gpu.plan_integer(m, n, k, bits, machine.arch, machine.processors)
    weights = 4 * ops.host().gpu.packed_words(bits, n, k) + n * (9 if asymmetric else 8)
    if plan["kernel"] == "sm90":
        return sm90_cost(machine, plan, m, n, k, weights, 1, 2 * QUAD_EXPANSION[bits])
    splits, blocks, panels = plan["splits"], plan["blocks"], plan["panels"]
    tiles = plan["tokens"] // 8 // plan["warps_m"]
    chunks_of_block = -(-k // 128) / splits
    token_tiles = -(-m // plan["tokens"])
    x_reads = blocks * chunks_of_block * 128 * min(m, plan["tokens"])
    partial = 2 * 4 * splits * m * n if splits > 1 else 0
    busiest = -(-blocks // machine.processors)
    warp_chunks = busiest * chunks_of_block * plan["channels"] / (16 * panels) * plan["warps_m"]
    read = 256 * (4 * tiles + bits * panels)  # bytes of shared memory, per warp and chunk
    return Cost(
        memory=(weights + m * k + 2 * m * n) / (machine.memory * MEMORY_SHARE),
        l2=(weights * token_tiles + x_reads + partial + 2 * m * n) / machine.l2,
        issue=warp_chunks / QUARTERS * quad_instructions(bits, panels, tiles) / machine.clock,
        tensor=warp_chunks / QUARTERS * 4 * panels * tiles * machine.mma_cycles / machine.clock,
        launches=machine.launch + row_cost(machine, m, k, kind, block) + (REDUCE_LAUNCH if splits > 1 else 0),
        blocks=blocks,
        splits=splits,
        blocks_per_processor=min(plan["blocks_per_processor"], busiest),
        shared=warp_chunks * read / SHARED_BYTES / machine.clock,
    )


def active_experts(m: int, experts: int, top_k: int) -> float:
    """How many have any of m tokens, each of which goes to top_k of them at random."""
    return experts * (1 - (1 - top_k / experts) ** m)


def grouped_cost(machine: Machine, m: int, n: int, k: int, bits: int, experts: int, top_k: int, integer: bool) -> float:
    """Seconds of a product with a weight per expert at best: the bytes of those that have tokens, or its products."""
    rows, active = m * top_k, active_experts(m, experts, top_k)
    moved = active * n * (k * bits / 8 + 9) + rows * (k * (1 if integer else 2) + 2 * n)
    products = rows * n * k / (16 * 8 * (32 if integer else 16))
    tensor = products * machine.mma_cycles / (machine.processors * QUARTERS * machine.clock)
    quantizing = row_cost(machine, rows, k, "quantize") if integer else 0
    return max(moved / (machine.memory * MEMORY_SHARE), tensor) + machine.launch + quantizing


def bf16_cost(machine: Machine, m: int, n: int, k: int) -> float:
    """Seconds of the 16-bit product at best: its bytes, or its operations at the data sheet's rate."""
    wgmma_cycles = 4  # of as many operations as one mma.m16n8k16
    operations = m * n * k / (16 * 8 * 16) * wgmma_cycles / (machine.processors * QUARTERS * machine.clock)
    return max(2 * (n * k + m * (n + k)) / (machine.memory * MEMORY_SHARE), operations) + machine.launch
