"""The state of an evaluation: whose it is, one program at a time, and scans that change while they are read."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from dcformer_deploy.benchmarks.evaluation.run import read_unless_known, recall_or_compute
from dcformer_deploy.benchmarks.evaluation.state import State, open_state, stamp
from dcformer_deploy.runtime import InputError, Model, files
from dcformer_deploy.runtime.errors import DcformerWarning, DiskFull

IDENTITY = {"command": "evaluate", "bundle": "a" * 64, "options": {}}
ROW = np.arange(3, dtype=np.float32)


def _interrupted(path: Path, key: str = "a") -> None:
    with pytest.raises(RuntimeError), open_state(path, IDENTITY) as state:
        state.put(key, "1", ROW)
        raise RuntimeError


def test_goes_on_unless_fresh(tmp_path: Path):
    path = tmp_path / "state.jsonl"
    _interrupted(path)
    with pytest.raises(RuntimeError), open_state(path, IDENTITY) as state:
        np.testing.assert_array_equal(state.get("a", "1"), ROW)
        assert state.get("a", "2") is None
        assert state.get("b", "1") is None
        raise RuntimeError
    with open_state(path, IDENTITY, fresh=True) as state:
        assert state.get("a", "1") is None
    assert not path.exists()


@pytest.mark.parametrize(("identity", "differs"), [
    ({**IDENTITY, "bundle": "b"}, f"its bundle is '{'a' * 64}', not 'b'"),
    ({**IDENTITY, "options": {"slope": "2.0"}}, "its options is {}, not {'slope': '2.0'}"),
    ({**IDENTITY, "more": True}, "its more is None, not True"),
    ({"command": "evaluate", "bundle": "a" * 64}, "its options is {}, not None"),
])
def test_of_another_identity_is_refused(tmp_path: Path, identity: dict[str, object], differs: str):
    path = tmp_path / "state.jsonl"
    _interrupted(path)
    before = path.read_bytes()
    with pytest.raises(InputError) as caught, open_state(path, identity):
        pass
    assert str(caught.value) == (f"{path}: the state of another evaluation: {differs}; pass --fresh to begin anew, or "
                                 "another --state")
    assert path.read_bytes() == before
    with open_state(path, identity, fresh=True) as state:
        assert state.get("a", "1") is None


@pytest.mark.parametrize("line", [b'{"key": "a", "stamp": "1", "shape": [0], "data": ""}\n', b'{"identity": 5}\n',
                                  b'{"identity": {"comm\n'])
def test_that_does_not_say_whose_it_is(tmp_path: Path, line: bytes):
    """Of an earlier version, for example."""
    path = tmp_path / "state.jsonl"
    path.write_bytes(line * 2)
    with pytest.raises(InputError, match="does not say which evaluation's state it is"), open_state(path, IDENTITY):
        pass
    assert path.read_bytes() == line * 2
    with open_state(path, IDENTITY, fresh=True):
        pass


@pytest.mark.parametrize("content", ["precious", '{"other": 1}\n', "\n"])
def test_a_file_that_is_no_state_stays(tmp_path: Path, content: str):
    path = tmp_path / "thesis.txt"
    path.write_text(content)
    for fresh in (False, True):
        with pytest.raises(InputError, match="thesis.txt: not the state of an evaluation"), \
                open_state(path, IDENTITY, fresh):
            pass
    assert path.read_text() == content


def test_a_special_file_stays(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: not the state of an evaluation"), \
            open_state(tmp_path / "pipe", IDENTITY):
        pass
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("content", ["", '{"ident', '{"identity": {"command": "eva', '{"key": "a", "sta'])
def test_a_state_that_was_cut_off_is_begun_anew(tmp_path: Path, content: str):
    path = tmp_path / "state.jsonl"
    path.write_text(content)
    _interrupted(path)
    with open_state(path, IDENTITY) as state:
        assert state.get("a", "1") is not None
    assert not path.exists()


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path):
    path = tmp_path / "state.jsonl"
    _interrupted(path)
    with path.open("a") as file:
        file.write('{"key": "b", "stamp": "1", "sha')
    _interrupted(path, "c")
    with open_state(path, IDENTITY) as state:
        assert [state.get(key, "1") is not None for key in "abc"] == [True, False, True]


def test_one_evaluation_at_a_time(tmp_path: Path):
    path = tmp_path / "state.jsonl"
    with pytest.raises(RuntimeError), open_state(path, IDENTITY) as state:
        state.put("a", "1", ROW)
        for fresh in (False, True):
            with pytest.raises(InputError, match="state.jsonl: another evaluation keeps its state there; wait for its "
                               "end, or choose another --state"), open_state(path, IDENTITY, fresh):
                pass
        raise RuntimeError
    with open_state(path, IDENTITY) as state:
        assert state.get("a", "1") is not None
    assert not path.exists()


def test_a_state_that_is_removed_while_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other evaluation may end between the two; a file without a name would be lost with this program."""
    path = tmp_path / "state.jsonl"
    flock, removed = fcntl.flock, []

    def removing(file: int, how: int) -> None:
        flock(file, how)
        if not removed:
            path.unlink()
            removed.append(1)

    monkeypatch.setattr(fcntl, "flock", removing)
    _interrupted(path)
    with open_state(path, IDENTITY) as state:
        assert state.get("a", "1") is not None


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(file: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "lock_file", refuse)
    with (pytest.warns(DcformerWarning, match=r"its file system has no locks \(No locks available\); see"),
          open_state(tmp_path / "state.jsonl", IDENTITY) as state):
        state.put("key", "stamp", np.ones(2, np.float32))


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "state.jsonl"
    with pytest.raises(DiskFull, match="state.jsonl: cannot be written"), open_state(path, IDENTITY) as state:
        state.put("a", "1", ROW)
        monkeypatch.setattr(os, "write", full)
        state.put("b", "1", ROW)
    monkeypatch.undo()
    with open_state(path, IDENTITY) as state:
        assert state.get("a", "1") is not None


@pytest.fixture
def state(tmp_path: Path):
    with open_state(tmp_path / "state.jsonl", IDENTITY) as opened:
        yield opened


def test_known_scan_that_is_touched_meanwhile(state: State, model: Model, scans: Path, tmp_path: Path):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes((scans / "b.nii.gz").read_bytes())
    state.put("a", stamp(path, {}), ROW)
    read = read_unless_known(path, {}, state, ["a"], model)
    assert read.volume is None
    os.utime(path, (1, 1))
    np.testing.assert_array_equal(recall_or_compute(state, "a", read, lambda volume: volume[0, 0]), ROW)


def test_scan_that_is_replaced_after_it_was_read(state: State, model: Model, scans: Path, tmp_path: Path):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes((scans / "b.nii.gz").read_bytes())
    before = stamp(path, {})
    read = read_unless_known(path, {}, state, ["a"], model)
    path.write_bytes((scans / "d.nii.gz").read_bytes())
    os.utime(path, (1, 1))
    found = recall_or_compute(state, "a", read, lambda volume: volume[0, 0])
    np.testing.assert_array_equal(found, model.preprocess(scans / "b.nii.gz")[0, 0])
    assert state.get("a", stamp(path, {})) is None
    assert state.get("a", before) is not None


def test_scan_that_changes_while_it_is_read(state: State, model: Model, scans: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes((scans / "b.nii.gz").read_bytes())
    read = model.preprocess
    monkeypatch.setattr(model, "preprocess", lambda scan: (read(scan), os.utime(path, (1, 1)))[0])
    with pytest.raises(InputError, match="scan.nii.gz: changed while it was read"):
        read_unless_known(path, {}, state, ["a"], model)


def test_stamp_follows_the_scan_and_its_table(tmp_path: Path):
    scan, table, other = (tmp_path / name for name in ("scan.nii", "table.csv", "other.csv"))
    for path in (scan, table, other):
        path.write_bytes(b"12")
        os.utime(path, (1, 1))
    stamps = [stamp(scan, {}), stamp(scan, {"metadata": table}), stamp(scan, {"metadata": other})]
    table.write_bytes(b"123")
    os.utime(table, (1, 1))
    stamps.append(stamp(scan, {"metadata": table}))
    os.utime(scan, (2, 2))
    stamps += [stamp(scan, {}), stamp(scan, {"metadata": table})]
    assert len(set(stamps)) == len(stamps)
    table.unlink()
    assert stamp(scan, {"metadata": table}) not in stamps
