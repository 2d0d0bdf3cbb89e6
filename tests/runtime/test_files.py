"""Writing: old content or new, never a mixture, never somebody else's."""

import itertools
from pathlib import Path

import pytest

from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.files import (
    atomic_file,
    atomic_folder,
    require_writable_file,
    require_writable_folder,
)
from dcformer_deploy.runtime.scan_files import path_text


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_text(content)
    return path


def test_folder_gets_its_name_at_the_end(tmp_path: Path):
    target = tmp_path / "a" / "b" / "new"
    with atomic_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    assert list(target.parent.iterdir()) == [target]


def test_failure_leaves_nothing_not_even_parents(tmp_path: Path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / "a" / "b" / "new") as folder:
        (folder / "x").write_text("1")
        raise KeyError
    with pytest.raises(KeyError), atomic_file(tmp_path / "c" / "file") as file:
        file.write_text("1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_only_the_same_kind_is_replaced(tmp_path: Path):
    bundle, other = folder_with(tmp_path / "bundle", marker="old", y="1"), folder_with(tmp_path / "other", work="1")
    with atomic_folder(bundle, "marker") as folder:
        (folder / "marker").write_text("new")
    assert [path.name for path in bundle.iterdir()] == ["marker"]
    for path, marker in ((other, "marker"), (bundle, None)):
        with pytest.raises(InputError, match="exists"), atomic_folder(path, marker):
            pytest.fail("must not get here")
    assert (other / "work").read_text() == "1"
    (tmp_path / "link").symlink_to(bundle)
    with pytest.raises(InputError, match="exists"), atomic_folder(tmp_path / "link", "marker"):
        pytest.fail("must not get here")


def test_folder_made_meanwhile_is_kept(tmp_path: Path):
    with pytest.raises(InputError, match="exists already"), atomic_folder(tmp_path / "new"):
        folder_with(tmp_path / "new", theirs="1")
    assert (tmp_path / "new" / "theirs").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_old_folder_returns_if_the_exchange_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = folder_with(tmp_path / "bundle", marker="old")
    replace = Path.replace

    def fail_on_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_on_new)
    with pytest.raises(KeyboardInterrupt), atomic_folder(bundle, "marker") as folder:
        (folder / "marker").write_text("new")
    assert (bundle / "marker").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_no_two_paths_are_written_alike():
    """Names of bytes that are no UTF-8, and names that look like what is written of those; others as they are."""
    parts = ["a", "\\", "\\\\", "\udcff", "\udc80", "\\udcff", "udcff", "\\ud8", "\\x", "ü", "0041", "\\\\udcff", "f"]
    paths = {"".join(words) for count in range(5) for words in itertools.product(parts, repeat=count)}
    texts = {path_text(Path("/d", path)) for path in paths}
    assert len(texts) == len({Path("/d", path) for path in paths})
    assert all(text.encode() for text in texts)
    for name in ("scan 1.nii.gz", "ü.nii", "C:\\scans\\1.nii", "a\\udc.nii", "a\\u00fc.nii", "\\\\host\\x"):
        assert path_text(Path(name)) == name
    assert path_text(Path("a\udcff.nii")) == "a\\udcff.nii"  # as stores have had it
    assert path_text(Path("a\\udcff.nii")) == "a\\\\udcff.nii"


def test_names_as_long_as_they_may_be(tmp_path: Path):
    name = "n" * 255
    with atomic_file(tmp_path / name) as temporary:
        temporary.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(OSError, match="File name too long"):
        require_writable_file(tmp_path / f"{name}n")


def test_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write here"), atomic_file(tmp_path / "file" / "x"):
        pytest.fail("must not get here")
    with pytest.raises(InputError, match="found a folder"), atomic_file(tmp_path):
        pytest.fail("must not get here")
    for require in (require_writable_file, require_writable_folder):
        with pytest.raises(InputError, match="cannot write here"):
            require(tmp_path / "file" / "x")
        require(tmp_path / "new" / "x")
    require_writable_folder(tmp_path)
    with pytest.raises(InputError, match="found a file"):
        require_writable_folder(tmp_path / "file")
    with pytest.raises(InputError, match="found a folder"):
        require_writable_file(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
