"""The store: what is written is read, parts are whole, others' results and other writers are refused."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.errors import DcformerWarning, DiskFull
from dcformer_deploy.runtime.store import Entry, Identity, Known, Store, read_store
from dcformer_deploy.runtime.store import index as index_module
from dcformer_deploy.runtime.store import store as module
from dcformer_deploy.runtime.store.index import Index

IDENTITY = Identity("a" * 64, "dcformer-nano", "fp32", 4, ("Emphysema", "Atelectasis"), {"slope": 2.0})


def _sha256(index: int) -> str:
    return hashlib.sha256(bytes([index])).hexdigest()


def _entry(index: int, **changes: object) -> Entry:
    rng = np.random.default_rng(index)
    entry = Entry(f"/scans/{index}.nii.gz", 10 + index, 20 + index, _sha256(index),
                  rng.random(4, np.float32), rng.random(2, np.float32), None, (5, 6, 7), (0.5, 0.5, 1.5), "LPS",
                  "1 * v - 1024")
    return dataclasses.replace(entry, **changes)


def test_rows_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PART_ROWS", 3)
    entries = [*map(_entry, range(7)), Entry("/scans/bad.nii.gz", 1, 2, error="not gzip")]
    with Store(tmp_path / "s", IDENTITY) as store:
        for entry in entries:
            store.append(entry)
    assert [path.name for path in module.parts(tmp_path / "s")] == [f"part-{i:06d}.parquet" for i in range(3)]
    rows = read_store(tmp_path / "s").to_pylist()
    assert [row["path"] for row in rows] == [entry.path for entry in entries]
    for row, entry in zip(rows, entries, strict=True):
        for name, value in dataclasses.asdict(entry).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(np.array(row[name], np.float32), value)
            else:
                assert row[name] == (list(value) if isinstance(value, tuple) else value)
    with Store(tmp_path / "s", IDENTITY) as store:
        assert store.index.file("/scans/3.nii.gz") == Known(13, 23, failed=False)
        assert store.index.file("/scans/bad.nii.gz") == Known(1, 2, failed=True)
        assert store.index.file("/scans/9.nii.gz") is None
        assert _sha256(5) in store.index.contents() and _sha256(99) not in store.index.contents()
        found = store.same_content(_sha256(5))
        assert found is not None
        np.testing.assert_array_equal(found.embedding, entries[5].embedding)
        np.testing.assert_array_equal(found.scores, entries[5].scores)
        assert store.same_content(_sha256(99)) is None


def test_the_last_row_of_a_path_counts(tmp_path: Path):
    with Store(tmp_path / "s", IDENTITY) as store:
        store.append(_entry(1, error="failed", embedding=None, scores=None))
    with Store(tmp_path / "s", IDENTITY) as store:
        store.append(_entry(2))
        store.append(_entry(1))
    rows = read_store(tmp_path / "s").to_pylist()
    assert [(row["path"][7], row["error"]) for row in rows] == [("2", None), ("1", None)]
    assert len(pq.read_table(module.parts(tmp_path / "s")[0])) == 1


@pytest.mark.parametrize(("changes", "field"), [
    ({"results_sha256": "b" * 64}, "results_sha256"), ({"precision": "fp16"}, "precision"),
    ({"classes": ("Emphysema",)}, "classes"), ({"options": {}}, "options")])
def test_results_of_another_identity_are_refused(tmp_path: Path, changes: dict, field: str):
    with Store(tmp_path / "s", IDENTITY):
        pass
    with pytest.raises(InputError, match=f"a store of other results: its {field} is .*choose another --out"):
        Store(tmp_path / "s", dataclasses.replace(IDENTITY, **changes))


def test_what_is_no_store(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(InputError, match="not a store of this version"):
            Store(tmp_path / name, IDENTITY)
    (tmp_path / "folder" / "store.json").write_text('{"format": "dcformer-deploy store 0"}')
    with pytest.raises(InputError, match="not a store of this version"):
        read_store(tmp_path / "folder")


def test_one_writer_at_a_time(tmp_path: Path):
    """Another process; its death, however sudden, lets the next one in."""
    with Store(tmp_path / "s", IDENTITY):
        pass
    code = ("import fcntl, os, sys, time; f = os.open(sys.argv[1], os.O_RDWR); fcntl.flock(f, fcntl.LOCK_EX); "
            "print('locked', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "s" / "lock"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match="another program writes to it"):
            Store(tmp_path / "s", IDENTITY)
        other.kill()
    with Store(tmp_path / "s", IDENTITY) as store:
        assert not len(store.index)


def test_leftovers_go_and_damaged_parts_are_set_aside(tmp_path: Path):
    for index in range(3):
        with Store(tmp_path / "s", IDENTITY) as store:
            store.append(_entry(index))
    (tmp_path / "s" / "part-000003.tmp").write_bytes(b"half a part")
    part = tmp_path / "s" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.warns(DcformerWarning, match="part-000001.parquet: damaged .*renamed to part-000001.damaged"), \
            Store(tmp_path / "s", IDENTITY) as store:
        assert [store.index.file(f"/scans/{i}.nii.gz") is None for i in range(3)] == [False, True, False]
        store.append(_entry(1))
    assert not (tmp_path / "s" / "part-000003.tmp").exists()
    assert {row["path"] for row in read_store(tmp_path / "s").to_pylist()} == {f"/scans/{i}.nii.gz" for i in range(3)}


def test_one_damaged_byte_is_noticed(tmp_path: Path):
    """In the values, where the file's structure stays whole; never is another value read in silence."""
    with Store(tmp_path / "s", IDENTITY) as store:
        for index in range(50):
            store.append(_entry(index))
    (part,) = module.parts(tmp_path / "s")
    whole, rows, noticed = part.read_bytes(), read_store(tmp_path / "s").to_pylist(), 0
    for at in range(100, len(whole) - 3000, 61):
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1:])
        try:
            assert read_store(str(tmp_path / "s")).to_pylist() == rows  # what a page says of itself beside its values
        except InputError as error:
            assert "part-000000.parquet: damaged" in str(error)
            noticed += 1
    assert noticed > 10


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(table: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    store = Store(tmp_path / "s", IDENTITY)
    store.append(_entry(0))
    store.flush()
    store.append(_entry(1))
    with monkeypatch.context() as patch:
        patch.setattr(module.pq, "write_table", full)
        with pytest.raises(DiskFull, match=r"part-000001.parquet: cannot be written \(No space left on device\)"):
            store.flush()
    assert sorted(path.suffix for path in (tmp_path / "s").iterdir()) == ["", ".json", ".parquet"]
    store.flush()  # space again: nothing was lost
    assert len(read_store(tmp_path / "s")) == 2


def test_an_index_is_a_dictionary_in_less_memory(monkeypatch: pytest.MonkeyPatch):
    """Against a dictionary, with files and contents that come again, over several merges."""
    monkeypatch.setattr(index_module, "_MERGE_AT", 50)
    index, files, contents, rng = Index(), {}, {}, np.random.default_rng(0)
    for part in range(40):
        rows = [(f"/{rng.integers(300)}", int(rng.integers(99)), part, _sha256(int(rng.integers(200))),
                 bool(rng.integers(2)), None) for _ in range(20)]
        index.add(part, rows)
        for number, (path, size, changed, sha256, failed, _) in enumerate(rows):
            files[path] = Known(size, changed, failed)
            if not failed:
                contents[sha256] = (part, number)
    assert all(index.file(f"/{i}") == files.get(f"/{i}") for i in range(300))
    assert all(index.content(_sha256(i)) == contents.get(_sha256(i)) for i in range(256))
    known = index.contents()
    assert [_sha256(i) in known for i in range(256)] == [_sha256(i) in contents for i in range(256)]
    assert len(index) == len(files)
    one = next(iter(contents))
    assert index.content(one[:16] + "0" * 48) is None  # half of the hash is not enough
    assert one[:16] + "0" * 48 not in known


def test_an_edited_store_json_is_noticed(tmp_path: Path):
    with Store(tmp_path / "s", IDENTITY) as store:
        store.append(_entry(0))
    path = tmp_path / "s" / module.INFO_NAME
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "classes": content["classes"][:-1]}))
    with pytest.raises(InputError, match=r"part-000000.parquet: damaged, or store.json is, .*column scores"):
        read_store(tmp_path / "s")
    with pytest.raises(InputError, match="column scores"):
        Store(tmp_path / "s", module.read_info(tmp_path / "s")[0])


def test_a_store_of_nothing_goes_again(tmp_path: Path):
    for name in ("new", "old"):
        if name == "old":
            with Store(tmp_path / name, IDENTITY):
                pass
        with pytest.raises(KeyboardInterrupt), Store(tmp_path / name, IDENTITY):
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    with pytest.raises(KeyboardInterrupt), Store(tmp_path / "new", IDENTITY) as store:
        store.append(_entry(0))
        raise KeyboardInterrupt
    assert len(read_store(tmp_path / "new")) == 1
