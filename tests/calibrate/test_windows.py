import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.windows import Window, schedule


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (12, "0 0-1 0-2 0-3 3-4 4-5 5-6 6-7 7-8 8-11 9-11 10-11 11"),
        (8, "0 0-1 0-2 0-3 3-4 4-7 5-7 6-7 7"),
        (5, "0 0-1 0-2 0-3 1-4 2-4 3-4 4"),
        (2, "0 0-1 1"),
        (1, "0"),
    ],
)
def test_published_defaults(blocks, expected):
    assert " ".join(map(str, schedule(blocks))) == expected


@pytest.mark.parametrize("blocks", [7, 12, 32, 80])
def test_defaults_give_one_window_more_than_blocks(blocks):
    assert len(schedule(blocks)) == blocks + 1


def test_a_stride_of_the_whole_window_leaves_no_gap_and_never_steps_back():
    windows = schedule(31, stride=2)
    assert windows[3:6] == [Window(0, 3), Window(2, 3), Window(4, 5)]
    assert windows[-5:] == [Window(26, 27), Window(27, 30), Window(28, 30), Window(29, 30), Window(30, 30)]


@settings(max_examples=500)
@given(
    blocks=st.integers(1, 100),
    shallow=st.integers(0, 8),
    deep=st.integers(0, 8),
    size=st.integers(1, 6),
    data=st.data(),
)
def test_every_schedule_is_a_monotone_cover(blocks, shallow, deep, size, data):
    stride = data.draw(st.integers(1, size))
    windows = schedule(blocks, shallow, deep, size, stride)
    assert {block for first, last in windows for block in range(first, last + 1)} == set(range(blocks))
    assert windows == sorted(windows)
    assert [last for _, last in windows] == sorted(last for _, last in windows)
    assert windows[-1].last == blocks - 1
    assert len(windows) == len(set(windows))


@pytest.mark.parametrize("arguments", [(0,), (4, -1), (4, 1, -1), (4, 1, 1, 0), (4, 1, 1, 2, 3), (4, 1, 1, 2, 0)])
def test_senseless_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        schedule(*arguments)
