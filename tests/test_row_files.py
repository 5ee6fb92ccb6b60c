"""Rows in files that any process may fill, at any time, and be killed: what is believed is what was written."""

import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_plugin.teacher_cache.rows import Bytes, Rows

SAMPLES, SIZE = 7, 11


def indices(*which: int) -> np.ndarray:
    return np.array(which, np.int64)


ALL = indices(*range(SAMPLES))


def values(seed: int, count: int = SAMPLES, size: int = SIZE) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (count, size), np.uint8)


writes = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.integers(0, SAMPLES - 1), unique=True), st.integers(0, 2**20)),
    max_size=12,
)


@given(writes, st.integers(1, 33))
@settings(max_examples=25, deadline=None)
def test_what_was_written_last_is_read_and_nothing_else(history: list[tuple[int, list[int], int]], size: int) -> None:
    """By the object that wrote it, by one that had looked before, and by a new one; views are no one else's."""
    with tempfile.TemporaryDirectory() as folder:
        writer, beside = (Rows(Path(folder), SAMPLES, size) for _ in range(2))
        expected: dict[tuple[int, int], bytes] = {}
        for view, which, seed in history:
            beside.read(view, ALL)
            rows = values(seed, len(which), size)
            writer.write(view, indices(*which), rows)
            expected |= {(view, index): row.tobytes() for index, row in zip(which, rows, strict=True)}
        for reader in (writer, beside, Rows(Path(folder), SAMPLES, size)):
            for view in range(6):
                found, whole = reader.read(view, ALL)
                assert whole.tolist() == [(view, index) in expected for index in range(SAMPLES)]
                for index in np.flatnonzero(whole).tolist():
                    assert found[index].tobytes() == expected[view, index]


def test_rows_are_read_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    rows, written = Rows(tmp_path, SAMPLES, SIZE), values(0)
    rows.write(0, ALL, written)
    found, whole = rows.read(0, indices(3, 0, 3, 6))
    assert whole.all()
    assert np.array_equal(found, written[[3, 0, 3, 6]])


def test_rows_of_zeros_are_told_from_rows_that_are_not_there(tmp_path: Path) -> None:
    rows = Rows(tmp_path, SAMPLES, SIZE)
    rows.write(0, indices(2), np.zeros((1, SIZE), np.uint8))
    assert rows.read(0, ALL)[1].tolist() == [index == 2 for index in range(SAMPLES)]


@given(st.integers(0, SAMPLES * SIZE - 1), st.integers(1, 255))
@settings(max_examples=30, deadline=None)
def test_a_row_with_a_wrong_byte_is_not_believed(place: int, change: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows, written = Rows(Path(folder), SAMPLES, SIZE), values(1)
        rows.write(3, ALL, written)
        file = Path(folder, "view-0003.rows")
        data = bytearray(file.read_bytes())
        data[place] ^= change
        file.write_bytes(data)
        torn = place // SIZE
        for reader in (rows, Rows(Path(folder), SAMPLES, SIZE)):
            assert np.flatnonzero(~reader.read(3, ALL)[1]).tolist() == [torn]
        rows.write(3, indices(torn), written[[torn]])
        found, whole = rows.read(3, ALL)
        assert whole.all()
        assert np.array_equal(found, written)


@pytest.mark.parametrize("name", ["view-0000.rows", "view-0000.sums"])
def test_files_that_were_cut_off_or_lost(tmp_path: Path, name: str) -> None:
    written = values(2)
    Rows(tmp_path, SAMPLES, SIZE).write(0, ALL, written)
    file = tmp_path / name
    each = file.stat().st_size // SAMPLES
    os.truncate(file, 2 * each + each // 2)
    rows = Rows(tmp_path, SAMPLES, SIZE)
    found, whole = rows.read(0, ALL)
    assert whole.tolist() == [True, True] + [False] * (SAMPLES - 2)
    assert np.array_equal(found[:2], written[:2])
    file.unlink()
    assert not Rows(tmp_path, SAMPLES, SIZE).read(0, ALL)[1].any()


def test_views_do_not_use_up_the_files_that_a_process_may_have_open(tmp_path: Path) -> None:
    rows = Rows(tmp_path, SAMPLES, SIZE)
    before = len(os.listdir("/proc/self/fd"))
    for view in range(60):
        rows.write(view, indices(0), values(view, 1))
    assert len(os.listdir("/proc/self/fd")) < before + 20
    assert all(np.array_equal(rows.read(view, indices(0))[0], values(view, 1)) for view in range(60))


# Processes. Row i that writer w writes is all of the byte 16 * i + w.

WIDE = 30_000  # several pages: no write is one step for whoever reads


def _of(writer: int) -> Bytes:
    return np.repeat(np.arange(SAMPLES, dtype=np.uint8)[:, None] * 16 + writer, WIDE, axis=1)


def _write(folder: Path, writer: int, times: int) -> None:
    rows = Rows(folder, SAMPLES, WIDE)
    for time in range(times):
        rows.write(0, np.roll(ALL, time), np.roll(_of(writer), time, axis=0))


def _is_somebodys(folder: Path) -> np.ndarray:
    """Which rows are believed; all of those are one writer's, whole."""
    found, whole = Rows(folder, SAMPLES, WIDE).read(0, ALL)
    for index in np.flatnonzero(whole).tolist():
        assert np.unique(found[index]).size == 1
        assert found[index, 0] // 16 == index
    return whole


def test_several_processes_write_the_same_rows(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, writer, 40)) for writer in range(3)]
    for process in writers:
        process.start()
    while any(process.is_alive() for process in writers):
        _is_somebodys(tmp_path)
    assert [process.exitcode for process in writers] == [0, 0, 0]
    _write(tmp_path, 5, 1)  # whatever they have left
    assert _is_somebodys(tmp_path).all()


def test_a_process_killed_while_it_writes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for times in (1, 2, 3):
        process = context.Process(target=_write, args=(tmp_path, times, 10**9))
        process.start()
        while not _is_somebodys(tmp_path).any():
            assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        _is_somebodys(tmp_path)
    _write(tmp_path, 5, 1)
    assert _is_somebodys(tmp_path).all()
