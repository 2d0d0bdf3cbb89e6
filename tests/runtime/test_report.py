"""The page of a scan: everything that it must tell, nothing that it must not, in a real browser."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from browser import screenshot, shown
from dicoms import write_series
from PIL import Image
from selenium.webdriver.common.by import By

from dcformer_deploy.runtime import InputError, Model, load
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.report.page import Section, write_page, write_tables
from dcformer_deploy.runtime.report.pictures import WINDOWS, scan_rows
from dcformer_deploy.runtime.report.scan import PageOptions, write_scan_page
from dcformer_deploy.runtime.volume import Volume
from dcformer_deploy.runtime.volume.types import LinearMap
from scans import write


@pytest.fixture(scope="module")
def page(pristine_bundle: Path, ct: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the real CT, where the encoder looked included; not to be changed."""
    out = tmp_path_factory.mktemp("page") / "r.html"
    assert main(["report", str(pristine_bundle), str(ct), "--out", str(out), "--blocks", "32",
                 "--explain", "lung nodule", "--explain", "Cardiomegaly"]) == 0
    return out


def test_in_a_browser(page: Path, model: Model, ct: Path, tmp_path: Path):
    with shown(page, tmp_path / "profile") as seen:
        assert seen.requests == []
        assert seen.complaints == []
        rows = seen.driver.find_elements(By.CSS_SELECTOR, "table.scores tr")[1:]
        scores = model.zero_shot(ct).scores
        ranked = sorted(scores, key=lambda name: -scores[name])
        assert [row.find_element(By.TAG_NAME, "td").text for row in rows] == ranked
        for row, name in zip(rows, ranked, strict=True):
            bar, track = (row.find_element(By.CLASS_NAME, part).size["width"] for part in ("fill", "track"))
            assert bar / track == pytest.approx(scores[name], abs=0.01)
            assert f"{scores[name]:.4f}" in row.text
        images = seen.driver.find_elements(By.TAG_NAME, "img")
        assert len(images) == 2 * 3 + 2 * 3
        for image in images:
            assert image.get_property("naturalWidth") > 50
            assert image.get_attribute("alt")
        headings = [heading.text for heading in seen.driver.find_elements(By.TAG_NAME, "h2")]
        assert headings == ["Scores", "The scan as it was read", "Where the encoder looked", "How it was read", "Model",
                            "Time"]
        text = seen.driver.find_element(By.TAG_NAME, "body").text
        for told in ("Research use only", "Lung nodule (", "Cardiomegaly (", model.manifest.digest, "onnxruntime",
                     "Each of 32 blocks", "Pleural effusion is not present."):
            assert told in text
        # Nothing sticks out sideways, on a narrow screen neither.
        for width in (1240, 500):
            seen.driver.set_window_size(width, 900)
            assert seen.driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"), width
        screenshot(seen, tmp_path / "page.png")
        assert np.asarray(Image.open(tmp_path / "page.png").convert("L")).std() > 20


def test_it_holds_all_that_it_shows(page: Path):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:image/png;base64,)", text)
    assert "http" not in re.sub(r"http-equiv|base64,[^\"]*", "", text)
    assert "<script" not in text
    assert len(text) < 3 << 20


def test_json(pristine_bundle: Path, ct: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "r.html"
    assert main(["report", str(pristine_bundle), str(ct), "--out", str(out), "--blocks", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"] == model.zero_shot(ct).scores
    assert found["blocks_dhw"] == [2, 2, 2]
    assert set(found["largest_effects"]) == set(found["scores"])
    assert main(["report", str(pristine_bundle), str(ct), "--out", str(out), "--no-occlusion", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_effects"] is None
    assert "Where the encoder looked" not in out.read_text()


def test_no_patient_in_it(pristine_bundle: Path, hounsfield: np.ndarray, tmp_path: Path):
    """Neither out of DICOM tags nor out of the names of files and folders, also not by way of warnings."""
    folder = tmp_path / "DOE_JANE_19700101"
    positions = [-400 + 1.7 * k + (5 if k > 20 else 0) for k in range(hounsfield.shape[2])]
    write_series(folder, hounsfield, positions=positions)
    out = tmp_path / "r.html"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["report", str(pristine_bundle), str(folder), "--out", str(out), "--no-occlusion",
                     "--resample-irregular"]) == 0
    text = re.sub(r"base64,[^\"]*", "", out.read_text())  # in which any letters occur
    for identifier in ("Doe", "Jane", "12345", "DOE", "JANE", "19700101"):
        assert identifier not in text
    assert "interpolated along the slices" in text
    assert main(["report", str(pristine_bundle), str(folder), "--out", str(out), "--no-occlusion",
                 "--resample-irregular", "--title", "Case <7> & more"]) == 0
    assert "<h1>Case &lt;7&gt; &amp; more</h1>" in out.read_text()


def test_slices_are_shown_upright(hounsfield: np.ndarray):
    """A mark at the patient's right, front and head is found there in every picture, however the scan is stored."""
    small = np.full((40, 50, 60), -1000.0, np.float32)  # to the left, the back, upwards
    small[:22, :27, 28:] = 400  # right, front, head, and a little over the middle
    for orientation, stored in (("LPS", small), ("RAS", small[::-1, ::-1]), ("SLP", small.transpose(2, 0, 1)),
                                ("PIR", small.transpose(1, 2, 0)[:, ::-1, ::-1])):
        volume = Volume("v", stored, (LinearMap(),), (1.0, 1.0, 1.0), orientation)
        ((_, pictures), _) = scan_rows(volume, in_hounsfield=True)
        assert [picture.edges for picture in pictures] == [
            ("R", "L", "A", "P"), ("R", "L", "H", "F"), ("A", "P", "H", "F")]
        bright = [_quarters(picture.source) for picture in pictures]
        assert bright == [(1, 0, 0, 0)] * 3, orientation
    unknown = Volume("v", small, (LinearMap(),), (1.0, 1.0, 1.0), "as-stored")
    ((_, pictures), _) = scan_rows(unknown, in_hounsfield=True)
    assert pictures[0].edges == ("", "", "", "")


def _quarters(source: str, channel: int | None = None) -> tuple[int, ...]:
    """Whether the upper left, upper right, lower left, lower right quarter of a picture is bright."""
    import base64
    import io

    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))))
    pixels = pixels if channel is None else pixels[..., channel]
    rows, columns = pixels.shape[0] // 2, pixels.shape[1] // 2
    return tuple(int(part.mean() > (128 if channel is None else 60)) for part in (
        pixels[:rows, :columns], pixels[:rows, columns:], pixels[rows:, :columns], pixels[rows:, columns:]))


def test_refused(pristine_bundle: Path, ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "r.html")
    for words, message in (
        (["--out", str(tmp_path / "r.pdf")], "expected a name ending in .html"),
        (["--out", out, "--explain", "Lung nodul"], "did you mean 'Lung nodule'?"),
        (["--out", str(tmp_path)], "expected a name ending in .html"),
        (["--out", out, "--blocks", "3"], "3 is not in the range"),
        (["--out", out, "--no-occlusion", "--explain", "Lung nodule"], "--no-occlusion leaves out; drop one"),
        (["--out", "/proc/x/r.html"], "cannot write here"),
    ):
        assert main(["report", str(pristine_bundle), str(ct), *words]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_values_that_are_no_hounsfield_units(hounsfield: np.ndarray):
    volume = Volume("v", hounsfield, (LinearMap(),), (1.0, 1.0, 1.0), "LPS")
    assert [title for title, _ in scan_rows(volume, in_hounsfield=True)] == list(WINDOWS)
    ((title, pictures),) = scan_rows(volume, in_hounsfield=False)
    assert title.startswith("from -1024 to ")
    assert len(pictures) == 3


def test_explain_needs_known_classes(model: Model, ct: Path, tmp_path: Path):
    options = PageOptions(classes=["Cat", "Dog"], explain=["Cow"], most_blocks=8)
    with pytest.raises(InputError, match="no class 'Cow'.*; the classes are Cat, Dog"):
        write_scan_page(model, ct, tmp_path / "r.html", options)
    result, found = write_scan_page(model, ct, tmp_path / "r.html", PageOptions(classes=["Cat", "Dog"], most_blocks=8))
    assert set(result.scores) == {"Cat", "Dog"}
    assert found is not None
    assert found.classes == ("Cat", "Dog")


def test_tables(tmp_path: Path):
    rows = [("a", "1,000", "x"), ("b", "500.5", "-"), ("c", "-", "y")]
    sections = [Section("Speed <b>", ("what", "ms", "note"), rows, ("A note.",), bars=1)]
    write_tables(tmp_path / "t.html", "Bench & more", [("machine", "AMD")], sections)
    with shown(tmp_path / "t.html", tmp_path / "profile") as seen:
        assert seen.requests == seen.complaints == []
        assert seen.driver.find_element(By.TAG_NAME, "h1").text == "Bench & more"
        assert seen.driver.find_element(By.TAG_NAME, "h2").text == "Speed <b>"
        widths = [bar.size["width"] for bar in seen.driver.find_elements(By.CLASS_NAME, "fill")]
        assert widths[1] / widths[0] == pytest.approx(0.5005, abs=0.01)
        assert len(widths) == 2


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(Exception, match="undefined"):
        write_page(tmp_path / "t.html", "tables.html", title="x", facts=[])
    assert not list(tmp_path.iterdir())


def test_untrained_weights_are_told(model: Model, pristine_bundle: Path, ct: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch):
    loaded = load(pristine_bundle)
    untrained = type(loaded.manifest.source)(None, None, False, None, 3)
    monkeypatch.setitem(loaded.manifest.__dict__, "source", untrained)
    write_scan_page(loaded, ct, tmp_path / "r.html", PageOptions(most_blocks=None))
    assert "The weights of this bundle are random: its scores mean nothing" in (tmp_path / "r.html").read_text()


def test_what_is_not_known_is_not_claimed(pristine_bundle: Path, ct: Path, hounsfield: np.ndarray, tmp_path: Path):
    out = tmp_path / "r.html"
    assert main(["report", str(pristine_bundle), str(ct), "--out", str(out), "--blocks", "8", "--orientation",
                 "as-stored"]) == 0
    text = out.read_text()
    assert "which way they lie is not known" in text
    assert "right on the left" not in text
    assert "axial" not in text
    blank = write(tmp_path / "DOE.nii", hounsfield, np.eye(4))
    table = tmp_path / "JANE.csv"
    table.write_text("VolumeName,XYSpacing,ZSpacing,RescaleSlope,RescaleIntercept\nDOE.nii,\"[0.9, 0.9]\",1.5,1,0\n")
    assert main(["report", str(pristine_bundle), str(blank), "--out", str(out), "--no-occlusion", "--metadata",
                 str(table)]) == 0
    text = re.sub(r"base64,[^\"]*", "", out.read_text())
    assert "the header is blank: its axes are taken to point to the left" in text
    assert "spacing, slope and intercept from a table" in text
    assert "JANE" not in text and "DOE" not in text


def test_pages_at_once_do_not_mix(model: Model, hounsfield: np.ndarray, tmp_path: Path):
    """Each tells what was done to its own scan, and nothing of libraries' warnings, whoever else is at work."""
    from concurrent.futures import ThreadPoolExecutor

    places = {}
    for name, gap in (("DOE", 5), ("ROE", 9)):
        positions = [-400 + 1.7 * k + (gap if k > 20 else 0) for k in range(hounsfield.shape[2])]
        write_series(tmp_path / name, hounsfield, positions=positions, uid="1.2.840.JANE")
        places[name] = f"first {1.7 + gap:.2f} mm"
    with warnings.catch_warnings(), ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("ignore")
        pages = [pool.submit(write_scan_page, model, tmp_path / name, tmp_path / f"{name}.html", PageOptions(
            most_blocks=None, read_options={"resample_irregular": True})) for name in list(places) * 3]
        for page in pages:
            page.result()
    for name, told in places.items():
        text = re.sub(r"base64,[^\"]*", "", (tmp_path / f"{name}.html").read_text())
        assert told in text
        assert not any(word in text for word in ("DOE", "ROE", "JANE"))


def test_a_scan_that_changes_meanwhile(model: Model, ct: Path, tmp_path: Path):
    path = tmp_path / "s.nii.gz"
    path.write_bytes(ct.read_bytes())

    def replace(done: int, of: int) -> None:
        path.write_bytes(ct.read_bytes())

    with pytest.raises(InputError, match="changed while its page was made"):
        write_scan_page(model, path, tmp_path / "r.html", PageOptions(most_blocks=8), replace)
    assert [one.name for one in tmp_path.iterdir()] == ["s.nii.gz"]


def test_colours_lie_where_the_blocks_are(model: Model):
    """For every orientation: the block that speaks for a class is orange, in the quarter where it is."""
    from dcformer_deploy.runtime.occlusion import Occlusion
    from dcformer_deploy.runtime.report.pictures import block_row

    spec = model.manifest.preprocessing
    for orientation, place in (("LPS", (1, 0, 0)), ("RAS", (1, 1, 1)), ("LPI", (0, 0, 0))):  # right, front, head
        effect = np.zeros((2, 2, 2, 1), np.float32)
        effect[place] = 2.0
        found = Occlusion(("a",), np.ones(1, np.float32), effect, (32, 64, 64), None, 9)
        volume = Volume("v", np.zeros((4, 4, 4), np.int16), (LinearMap(),), (1.0, 1.0, 1.0), orientation)
        seen = np.full(spec.shape_dhw, spec.value_range[0], np.float32)
        for picture in block_row(seen, volume, spec, found, "a"):
            assert _quarters(picture.source, channel=0) == (1, 0, 0, 0), (orientation, picture.caption)


def test_no_block_speaks_for_it():
    from dcformer_deploy.runtime.occlusion import Occlusion
    from dcformer_deploy.runtime.report.scan import _told

    effect = np.full((2, 2, 2, 1), -0.5, np.float32)
    told = _told(Occlusion(("a",), np.ones(1, np.float32), effect, (32, 64, 64), None, 9), "a")
    assert told == ("No block speaks for it: hiding any raises the score or leaves it as it is. "
                    "Strongest against it: -0.500. Full colour: 0.500.")
