"""The packed layouts: every index function walked exhaustively, and repacking against a slow model of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sliderquant_vllm import ops
from sliderquant_vllm.packing import pack_codes, unpack_codes

BITS = (2, 3, 4, 8)
PANEL = 32


@pytest.fixture(scope="module")
def host():
    return ops.host()


@pytest.mark.parametrize("bits", BITS)
def test_period_fills_whole_words(host, bits):
    assert host.period_words(bits) * 32 == host.period_codes(bits) * bits
    assert host.period_words(bits) == (3 if bits == 3 else 1)


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "quads"])
@pytest.mark.parametrize("bits", BITS)
def test_kernel_bits_are_a_permutation(host, bits, pairs):
    codes = host.period_codes(bits)
    found = [host.kernel_bit(pairs, bits, j, b) for j in range(codes) for b in range(bits)]
    assert sorted(found) == list(range(32 * host.period_words(bits)))


# (pairs, bits, code of the period, bit of the code) -> bit of the period
GOLDEN = {
    (True, 4, 0, 0): 0,
    (True, 4, 1, 0): 16,
    (True, 4, 2, 0): 4,
    (True, 4, 7, 3): 31,
    (True, 2, 0, 0): 0,
    (True, 2, 1, 1): 17,
    (True, 2, 14, 0): 14,
    (True, 8, 2, 0): 8,
    (True, 8, 1, 7): 23,
    (True, 3, 9, 0): 28,  # fifth pair, high half of word 0
    (True, 3, 10, 0): 32,  # sixth pair starts word 1
    (True, 3, 30, 0): 15,  # sixteenth pair: one bit on top of each word
    (True, 3, 30, 1): 47,
    (True, 3, 31, 2): 95,
    (False, 4, 0, 0): 0,
    (False, 4, 1, 0): 8,
    (False, 4, 4, 0): 4,
    (False, 4, 7, 3): 31,
    (False, 2, 15, 1): 31,
    (False, 8, 3, 0): 24,
    (False, 3, 0, 2): 64,  # high bits stand in word 2
    (False, 3, 16, 0): 32,  # fifth four start word 1
    (False, 3, 31, 2): 95,
}


@pytest.mark.parametrize("place", GOLDEN, ids=str)
def test_kernel_bit_golden(host, place):
    assert host.kernel_bit(*place) == GOLDEN[place]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n_count", "k_count"), [(1, 32), (32, 64), (33, 96), (100, 32)])
def test_word_index_is_injective_and_covers_whole_panels(host, bits, n_count, k_count):
    periods, words = k_count // host.period_codes(bits), host.period_words(bits)
    rows = -(-n_count // PANEL) * PANEL
    found = [host.word_index(bits, k_count, n, p, d) for n in range(rows) for p in range(periods) for d in range(words)]
    assert sorted(found) == list(range(host.packed_words(bits, n_count, k_count)))


def test_neighbouring_channels_are_neighbouring_words(host):
    assert [host.word_index(4, 64, n, 3, 0) for n in (0, 1, 31)] == [96, 97, 127]
    assert host.word_index(4, 64, 32, 0, 0) == 64 // 8 * PANEL


@pytest.mark.parametrize("bits", BITS)
def test_stream_code_reads_checkpoint_packing(host, bits):
    packed = torch.randint(-(2**31), 2**31, (1, 6 * bits), dtype=torch.int32)
    codes = unpack_codes(packed, bits)[0].tolist()
    row = packed[0].numpy()
    assert [host.stream_code(row, bits, k) for k in range(len(codes))] == codes


def slow_repack(host, codes: np.ndarray, bits: int, pairs: bool) -> np.ndarray:
    n_count, k_count = codes.shape
    period = host.period_codes(bits)
    packed = np.zeros(host.packed_words(bits, n_count, k_count), dtype=np.uint32)
    for n in range(n_count):
        for k in range(k_count):
            for b in range(bits):
                d, bit = divmod(host.kernel_bit(pairs, bits, k % period, b), 32)
                value = np.uint32((int(codes[n, k]) >> b & 1) << bit)
                packed[host.word_index(bits, k_count, n, k // period, d)] |= value
    return packed


@pytest.mark.parametrize("activation_bits", [16, 4])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n_count", "k_count"), [(3, 32), (33, 64), (64, 96), (5, 1056)])
def test_repack_matches_slow_model(isa, host, bits, activation_bits, n_count, k_count):
    codes = torch.randint(0, 2**bits, (n_count, k_count), generator=torch.Generator().manual_seed(bits))
    packed = ops.repack(pack_codes(codes, bits), bits, activation_bits)
    integer = activation_bits != 16
    assert packed.dtype == (torch.uint8 if integer else torch.int32)
    assert packed.shape == (-(-n_count // PANEL), k_count * bits // 32, PANEL * (4 if integer else 1))
    assert packed.data_ptr() % 64 == 0
    expected = slow_repack(host, codes.numpy(), bits, pairs=not integer)
    assert np.array_equal(packed.numpy().view(np.uint32).ravel(), expected)


@pytest.mark.parametrize("bits", BITS)
def test_sums_of_codes(isa, threads, bits):
    for n_count, k_count in ((1, 32), (100, 1056), (67, 2080)):
        codes = torch.randint(0, 2**bits, (n_count, k_count))
        packed = pack_codes(codes, bits)
        assert torch.equal(ops.column_sums(packed, bits), codes.sum(1, dtype=torch.int32))
    assert ops.column_sums(packed[:0], bits).shape == (0,)
    assert ops.repack(packed[:0], bits).shape[0] == 0


def test_repack_rejects_bad_arguments():
    good = torch.zeros(8, 4, dtype=torch.int32)
    assert ops.repack(good, 4).shape == (1, 4, PANEL)
    for arguments, message in [
        ((good, 5, 16), "repack: bits: expected 2, 3, 4 or 8; got 5"),
        ((good, 4, 12), "activation_bits: expected 16, or 2 to 8; got 12"),
        ((good, 3, 16), "repack: K: expected a positive multiple of 32; got 42"),
        ((good[0], 4, 16), r"weight_packed: expected contiguous int32 .* got int32 \[4\]"),
        ((good.long(), 4, 16), "weight_packed: expected contiguous int32"),
        ((good.T, 4, 16), "weight_packed: expected contiguous int32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.sliderquant.repack(*arguments)
    with pytest.raises(RuntimeError, match="column_sums: bits"):
        torch.ops.sliderquant.column_sums(good, 6)


def test_gpu_lanes_share_out_a_chunk(host):
    places = [(host.gpu.owner(k), host.gpu.run_index(k)) for k in range(128)]
    assert sorted(places) == [(t, i) for t in range(4) for i in range(32)]
    assert places[:33:8] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 8)]  # eight k each, then the next 32
    assert [i for _, i in places[64:72]] == list(range(16, 24))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n_count", "k_count"), [(1, 32), (16, 128), (33, 288), (48, 96)])
def test_gpu_word_index_is_injective_and_covers_whole_panels(host, bits, n_count, k_count):
    rows, chunks = -(-n_count // 16) * 16, -(-k_count // 128)
    places = [(n, chunk, t, d) for n in range(rows) for chunk in range(chunks) for t in range(4) for d in range(bits)]
    found = [host.gpu.word_index(bits, k_count, *place) for place in places]
    assert sorted(found) == list(range(host.gpu.packed_words(bits, n_count, k_count)))
    assert len(found) * 32 == rows * chunks * 128 * bits


# (bits, n, chunk, t, d) -> word of a weight with 256 input channels
GPU_GOLDEN = {
    (4, 0, 0, 0, 0): 0,
    (4, 8, 0, 0, 0): 1,  # row g + 8 beside row g
    (4, 0, 0, 0, 1): 2,  # the next 32 k
    (4, 0, 0, 1, 0): 4,  # lane 1
    (4, 1, 0, 0, 0): 16,  # lane 4
    (4, 0, 0, 0, 2): 128,  # the second vector of 32 lanes x 16 bytes
    (4, 0, 1, 0, 0): 256,  # the second chunk
    (4, 16, 0, 0, 0): 512,  # the second panel
    (2, 15, 0, 3, 1): 127,
    (2, 0, 1, 0, 0): 128,
    (3, 8, 0, 0, 0): 1,
    (3, 0, 0, 1, 0): 2,  # vectors of 8 bytes
    (3, 0, 0, 0, 1): 64,
    (3, 15, 1, 3, 2): 383,
    (8, 8, 0, 0, 7): 387,
}


@pytest.mark.parametrize("place", GPU_GOLDEN, ids=str)
def test_gpu_word_index_golden(host, place):
    bits, *rest = place
    assert host.gpu.word_index(bits, 256, *rest) == GPU_GOLDEN[place]
    assert host.gpu.vector_words(bits) == (2 if bits == 3 else 4)
