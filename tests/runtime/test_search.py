"""Search: exact against a plain product, approximate against exact, a gallery that follows its store."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dcformer_deploy.runtime import InputError, load
from dcformer_deploy.runtime.backends.openvino import NO_BFLOAT16, has_bfloat16
from dcformer_deploy.runtime.bundle import open_bundle, write_manifest
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.search import approximate, exact, recall
from dcformer_deploy.runtime.search.gallery import FOLDER, open_gallery
from dcformer_deploy.runtime.store import Entry, Identity, Store
from dcformer_deploy.runtime.store import store as store_module

IDENTITY = Identity("a" * 64, "dcformer-nano", "fp32", 24, (), {})


def _unit(count: int, seed: int, clusters: int = 40) -> np.ndarray:
    """Unit rows ``[count, 24]`` around some centres, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(clusters, 24))
    rows = centres[rng.integers(clusters, size=count)] + 0.5 * rng.normal(size=(count, 24))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _entry(path: str, row: np.ndarray | None, changed: int = 0) -> Entry:
    return Entry(path, 1, changed, None if row is None else row.tobytes().hex()[:64], row,
                 error="bad" if row is None else None)


def _store(folder: Path, rows: np.ndarray) -> Path:
    with Store(folder, IDENTITY) as store:
        for index, row in enumerate(rows):
            store.append(_entry(f"/scans/{index}.nii.gz", row))
    return folder


@pytest.mark.parametrize("k", [1, 5, 700])
def test_nearest_is_the_sorted_product(monkeypatch: pytest.MonkeyPatch, k: int):
    monkeypatch.setattr(exact, "_BLOCK", 100)
    gallery, queries = _unit(530, 1), _unit(7, 2)
    found = exact.nearest(queries, gallery, k)
    product = queries @ gallery.T
    order = np.argsort(-product, axis=1)[:, :k]
    np.testing.assert_array_equal(found.rows, order)
    np.testing.assert_allclose(found.cosines, np.take_along_axis(product, order, axis=1), atol=1e-6)


def test_nearer_counts_in_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exact, "_BLOCK", 7)
    queries, gallery = _unit(50, 1), _unit(50, 2)
    gallery[10] = gallery[30] = gallery[45]
    similarity = queries.astype(np.float64) @ gallery.astype(np.float64).T
    for index, counts in enumerate(zip(*exact.nearer(queries, gallery), strict=True)):
        more = [j for j in range(50) if similarity[index, j] > similarity[index, index] + 1e-9]
        equal = [j for j in range(50) if abs(similarity[index, j] - similarity[index, index]) <= 1e-9]
        assert counts == (len(more), len(equal))
        assert len(equal) == (3 if index in (10, 30, 45) else 1)


def test_the_gallery_has_the_last_good_row_of_each_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_module, "PART_ROWS", 4)
    rows = _unit(30, 1)
    folder = _store(tmp_path / "s", rows[:20])
    with Store(folder, IDENTITY) as store:
        store.append(_entry("/scans/3.nii.gz", rows[20], 1))  # changed since
        store.append(_entry("/scans/4.nii.gz", None, 1))  # cannot be read any more
        store.append(_entry("/scans/new.nii.gz", None))
    gallery = open_gallery(folder)
    paths = [gallery.path(row) for row in range(len(gallery.matrix))]
    assert sorted(paths) == sorted(f"/scans/{i}.nii.gz" for i in range(20) if i != 4)
    for row, path in enumerate(paths):
        number = int(Path(path).name.split(".")[0])
        np.testing.assert_array_equal(gallery.matrix[row], rows[20 if number == 3 else number])
        assert gallery.row_of(Path(path)) == row
        assert gallery.entry(row)["path"] == path
    assert gallery.row_of(Path("/scans/4.nii.gz")) is None
    assert isinstance(gallery.matrix, np.memmap)
    # Nothing is written again while the store is as it was, and what is new is found when it is not.
    before = (folder / FOLDER / "embeddings.npy").stat().st_ino
    open_gallery(folder)
    assert (folder / FOLDER / "embeddings.npy").stat().st_ino == before
    with Store(folder, IDENTITY) as store:
        store.append(_entry("/scans/new.nii.gz", rows[25]))
    again = open_gallery(folder)
    row = again.row_of(Path("/scans/new.nii.gz"))
    assert row is not None
    np.testing.assert_array_equal(again.matrix[row], rows[25])


def test_recall_is_measured_and_kept(tmp_path: Path):
    rows = _unit(6000, 1)
    gallery = open_gallery(_store(tmp_path / "s", rows))
    texts = -_unit(20, 5)  # far from every scan
    assert recall.read_measured(gallery) is None
    measured = approximate.build_index(gallery, 10, 0.98, texts)
    assert recall.read_measured(gallery) == measured
    assert measured.least_recall >= 0.98
    assert measured.probes == {"scans": 256, "texts": 20}
    queries = _unit(100, 9)
    found = approximate.nearest_approximately(queries, gallery, measured, 10)
    right = exact.nearest(queries, rows, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.rows, right.rows, strict=True)]) > 0.95
    np.testing.assert_allclose(found.cosines, np.einsum("qd,qkd->qk", queries, rows[found.rows]), atol=1e-6)
    assert (np.diff(found.cosines, axis=1) <= 0).all()
    # What is asked for decides how many candidates are looked at.
    assert approximate.build_index(gallery, 10, 0, texts).expansion == 32
    assert approximate.build_index(gallery, 10, 1.1, texts).expansion == 1024
    with Store(tmp_path / "s", IDENTITY) as store:
        store.append(_entry("/scans/new.nii.gz", _unit(1, 3)[0]))
    assert recall.read_measured(open_gallery(tmp_path / "s")) is None  # of the store as it was


def test_an_index_of_another_gallery_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The store changes, in place and in size as before, while the index is built."""
    rows = _unit(300, 1)
    gallery = open_gallery(_store(tmp_path / "s", rows))
    with Store(tmp_path / "s", IDENTITY) as store:
        for index in range(150):
            store.append(_entry(f"/scans/{index}.nii.gz", rows[index], 1))
    again = open_gallery(tmp_path / "s")
    assert len(again.matrix) == 300
    approximate.build_index(gallery, 5, 0.9, np.empty((0, 24), np.float32))  # into the folder of the new one
    assert recall.read_measured(again) is None


def test_many_equal_rows(tmp_path: Path):
    """Where the index finds fewer than it is asked for, nothing is made up."""
    rows = np.concatenate([np.repeat(_unit(1, 1), 2990, axis=0), _unit(10, 2)])
    gallery = open_gallery(_store(tmp_path / "s", rows))
    measured = approximate.build_index(gallery, 5, 0, np.empty((0, 24), np.float32))
    found = approximate.nearest_approximately(rows[:2], gallery, measured, 1001)
    assert all(len(set(one)) == 1001 for one in found.rows.tolist())


def test_leftovers_of_a_killed_search(tmp_path: Path):
    """They hinder neither `embed` nor the next search, which removes them."""
    folder = _store(tmp_path / "s", _unit(5, 1))
    leftover = folder / f".{FOLDER}.abc.tmp"
    (leftover / "new").mkdir(parents=True)
    with Store(folder, IDENTITY):
        pass
    open_gallery(folder)
    assert not leftover.exists()


def test_a_damaged_part_is_one_line(embedded: Path, tmp_path: Path, capsys):
    store = Path(shutil.copytree(embedded, tmp_path / "s"))
    shutil.rmtree(store / FOLDER, ignore_errors=True)
    (part,) = store.glob("part-*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    assert main(["search", str(store), "Emphysema."]) == 2
    assert "part-000000.parquet: damaged" in capsys.readouterr().err


def test_a_store_in_a_precision_that_only_openvino_has(pristine_bundle: Path, scans: Path, tmp_path: Path, capsys):
    pytest.importorskip("openvino")
    if not has_bfloat16():
        pytest.skip(NO_BFLOAT16)
    assert main(["embed", str(pristine_bundle), str(scans), "--out", str(tmp_path / "s"), "--backend", "openvino",
                 "--precision", "bf16"]) == 0
    capsys.readouterr()
    assert main(["search", str(tmp_path / "s"), "Emphysema."]) == 0
    assert "queries are embedded in fp32: " in capsys.readouterr().err


def test_damage_is_told(tmp_path: Path):
    gallery = open_gallery(_store(tmp_path / "s", _unit(50, 1)))
    measured = approximate.build_index(gallery, 5, 0.9, np.empty((0, 24), np.float32))
    index = gallery.folder / "approximate.usearch"
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(InputError, match=r"approximate.usearch: damaged .*dcformer index STORE. makes it anew"):
        approximate.nearest_approximately(_unit(1, 2), gallery, measured, 3)
    (gallery.folder / "approximate.json").write_text("{")
    with pytest.raises(InputError, match="approximate.json: damaged"):
        recall.read_measured(gallery)
    (gallery.folder / "rows.arrow").write_bytes(b"")
    with pytest.raises(InputError, match="damaged .*remove this folder, it will be made anew"):
        open_gallery(tmp_path / "s")


@pytest.fixture(scope="module")
def embedded(pristine_bundle: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "s"
    assert main(["embed", str(pristine_bundle), str(scans), "--out", str(out)]) == 0
    return out


def _search(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main(["search", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_texts_and_scans(pristine_bundle: Path, embedded: Path, scans: Path, tmp_path: Path, capsys):
    model = load(pristine_bundle)
    images = {path: model.embed_image(path) for path in sorted(scans.iterdir())}
    other = Path(shutil.copy(scans / "b.nii.gz", tmp_path / "elsewhere.nii.gz"))
    found = _search(capsys, embedded, "Emphysema.", scans / "b.nii.gz", other, "-k", 3)
    assert (found["search"], found["scans"]) == ("exact", 4)
    text, scan, copy = (result["hits"] for result in found["results"])
    cosines = {str(path): float(image @ model.embed_text("Emphysema.")[0]) for path, image in images.items()}
    expected = sorted(cosines.items(), key=lambda item: -item[1])[:3]
    assert [hit["path"] for hit in text] == [path for path, _ in expected]
    assert [hit["cosine"] for hit in text] == pytest.approx([cosine for _, cosine in expected], abs=1e-5)
    assert text[0]["scores"].keys() == dict.fromkeys(model.manifest.zero_shot.classes).keys()
    assert str(scans / "b.nii.gz") not in [hit["path"] for hit in scan]  # not itself
    assert len(scan) == 3
    assert copy[0]["path"] == str(scans / "b.nii.gz")  # the same scan from elsewhere
    assert copy[0]["cosine"] == pytest.approx(1, abs=1e-5)


def test_exact_search_needs_no_usearch(embedded: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    monkeypatch.delitem(sys.modules, "dcformer_deploy.runtime.search.approximate")
    assert _search(capsys, embedded, "Emphysema.")["search"] == "exact"
    assert main(["index", str(embedded)]) == 3
    assert "usearch.index is not installed; " in capsys.readouterr().err


def test_by_the_index(embedded: Path, scans: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    from dcformer_deploy.runtime.cli import search as command

    store = Path(shutil.copytree(embedded, tmp_path / "s"))
    assert main(["search", str(store), "Emphysema.", "--approximate"]) == 2
    assert "has no index, or has changed since; `dcformer index" in capsys.readouterr().err
    assert main(["index", str(store), "-k", "2", "--recall", "0"]) == 0  # untrained, all cosines are nearly equal
    assert re.search(r"index of 4 scans; recall@2 [01].\d+ for 4 scans, [01].\d+ for 36 texts, looking at 32",
                     capsys.readouterr().out)
    found = _search(capsys, store, "Emphysema.", "--approximate")
    assert found["search"].startswith("approximate, recall@2 ")
    plain = _search(capsys, store, "Emphysema.")
    assert plain["search"] == "exact"
    hits, exact_hits = found["results"][0]["hits"], plain["results"][0]["hits"]
    assert [hit["cosine"] for hit in hits] == pytest.approx([hit["cosine"] for hit in exact_hits], abs=1e-6)
    monkeypatch.setattr(command, "_INDEX_FROM", 3)  # as if it were large: the index by default
    assert _search(capsys, store, "Emphysema.")["search"].startswith("approximate")
    assert _search(capsys, store, "Emphysema.", "--exact")["search"] == "exact"
    (store / FOLDER / "approximate.json").unlink()
    assert main(["search", str(store), "Emphysema."]) == 0
    assert "4 scans: `dcformer index" in capsys.readouterr().err


def test_an_index_that_misses_its_recall(embedded: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    store = Path(shutil.copytree(embedded, tmp_path / "s"))
    monkeypatch.setattr(approximate, "_recall", lambda found, right: 0.5)
    assert main(["index", str(store)]) == 1
    assert "looking at 1024 candidates; --recall 0.99 is missed" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (("{none}", "text"), "not a store of this version"), (("{store}", " "), "an empty text"),
    (("{store}", "{none}.nii.gz"), "no such"),
    (("{store}", "text", "--bundle", "{none}"), "is not there; pass --bundle"),
    (("{store}", "text", "--bundle", "{other}"), "not the bundle of"),
])
def test_refused(embedded: Path, bundle_copy: Path, tmp_path: Path, capsys, arguments: tuple, message: str):
    write_manifest(bundle_copy, replace(open_bundle(bundle_copy).manifest, created="later"))
    names = {"store": embedded, "none": tmp_path / "none", "other": bundle_copy}
    assert main(["search", *(argument.format(**names) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_search(tmp_path: Path):
    with Store(tmp_path / "s", IDENTITY) as store:
        store.append(_entry("/scans/0.nii.gz", None))
    with pytest.raises(InputError, match="nothing has been embedded in it"):
        open_gallery(tmp_path / "s")
    assert not (tmp_path / "s" / FOLDER).exists()
