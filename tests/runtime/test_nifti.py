"""Reading NIfTI: geometry, every kind of bad input, and never guessing."""

import gzip
import itertools
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.volume import ReadOptions, read_nifti
from dcformer_deploy.runtime.volume.hounsfield import HounsfieldWarning
from scans import LPS_AFFINE, SPACING, edit_header, write

EXPLICIT = ReadOptions(spacing=(1.0, 1.0, 1.0))


def refuse(path: Path, message: str, options: ReadOptions | None = None) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_nifti(path, "LPS", options or ReadOptions())
    assert "\n" not in str(error.value)
    assert path.name in str(error.value)


# ---------------------------------------------------------------- geometry


def test_plain_scan(hounsfield: np.ndarray, tmp_path: Path):
    volume = read_nifti(write(tmp_path / "a.nii.gz", hounsfield))
    np.testing.assert_array_equal(volume.stored, hounsfield)
    assert volume.stored.dtype == np.int16
    np.testing.assert_allclose(volume.spacing_hwd_mm, SPACING, rtol=1e-6)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product((1, -1), repeat=3)))
def test_every_stored_orientation_gives_the_same_volume(order, flips, hounsfield: np.ndarray, tmp_path: Path):
    """The 48 ways to store one scan: axes permuted and reversed, the affine saying so."""
    stored, affine = hounsfield, LPS_AFFINE.copy()
    for axis, flip in enumerate(flips):
        if flip < 0:
            stored = np.flip(stored, axis)
            affine[:3, 3] += affine[:3, axis] * (hounsfield.shape[axis] - 1)
            affine[:3, axis] *= -1
    stored, affine = stored.transpose(order), affine[:, [*order, 3]]
    volume = read_nifti(write(tmp_path / "a.nii", stored, affine))
    np.testing.assert_array_equal(volume.stored, hounsfield)
    np.testing.assert_allclose(volume.spacing_hwd_mm, SPACING, rtol=1e-6)
    as_stored = read_nifti(tmp_path / "a.nii", options=ReadOptions(orientation="as-stored"))
    np.testing.assert_array_equal(as_stored.stored, stored)
    np.testing.assert_allclose(as_stored.spacing_hwd_mm, [SPACING[axis] for axis in order], rtol=1e-6)


def test_given_spacing_is_along_the_stored_axes(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii", hounsfield.transpose(2, 0, 1), LPS_AFFINE[:, [2, 0, 1, 3]])
    volume = read_nifti(path, options=ReadOptions(spacing=(3.0, 1.0, 2.0)))
    np.testing.assert_array_equal(volume.stored, hounsfield)
    assert volume.spacing_hwd_mm == (1.0, 2.0, 3.0)


def test_oblique_scan_goes_to_the_nearest_axes(hounsfield: np.ndarray, tmp_path: Path):
    angle = np.deg2rad(15)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = LPS_AFFINE.copy()
    affine[:3, :3] = turn @ affine[:3, :3]
    volume = read_nifti(write(tmp_path / "a.nii", hounsfield, affine))
    np.testing.assert_array_equal(volume.stored, hounsfield)
    np.testing.assert_allclose(volume.spacing_hwd_mm, SPACING, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.float32, np.float64, np.int8, np.uint8])
def test_data_types_and_file_scaling(dtype, hounsfield: np.ndarray, tmp_path: Path):
    """The file's own slope and intercept come first; nibabel's get_fdata is the truth."""
    path = tmp_path / "a.nii"
    write(path, ((hounsfield + 1024) / 40).astype(dtype), scl_slope=40.0, scl_inter=-1024.0)
    volume = read_nifti(path)
    assert volume.stored.dtype == np.dtype(dtype)
    expected = nib.load(path).get_fdata()
    assert expected.min() < -900 and expected.max() > 200
    np.testing.assert_array_equal(volume.hounsfield(volume.stored), expected.astype(np.float32))


def test_big_endian_file(hounsfield: np.ndarray, tmp_path: Path):
    image = nib.Nifti1Image(hounsfield, LPS_AFFINE, nib.Nifti1Header(endianness=">"), dtype=np.int16)
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_nifti(tmp_path / "a.nii.gz")
    assert volume.stored.dtype == np.dtype(">i2")
    np.testing.assert_array_equal(volume.stored, hounsfield)


def test_slope_and_intercept_follow_the_file_scaling(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii", (hounsfield + 1024).astype(np.int16))
    edit_header(path, scl_slope=2.0, scl_inter=10.0)
    volume = read_nifti(path, options=ReadOptions(slope=0.5, intercept=-1029.0))
    np.testing.assert_allclose(volume.hounsfield(volume.stored), hounsfield)


def test_one_volume_in_four_dimensions(hounsfield: np.ndarray, tmp_path: Path):
    volume = read_nifti(write(tmp_path / "a.nii.gz", hounsfield[..., None]))
    np.testing.assert_array_equal(volume.stored, hounsfield)


def test_nifti_2(hounsfield: np.ndarray, tmp_path: Path):
    nib.save(nib.Nifti2Image(hounsfield, LPS_AFFINE), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii.gz").stored, hounsfield)


# ---------------------------------------------------------------- blank headers


@pytest.fixture(params=["no form", "identity", "identity in LPS"])
def blank(request, hounsfield: np.ndarray, tmp_path: Path) -> Path:
    """As CT-RATE's original files are: nothing in the header but the shape."""
    path = tmp_path / "train_1_a_1.nii"
    if request.param == "no form":
        return write(path, hounsfield, qform_code=0, sform_code=0)
    return write(path, hounsfield, np.eye(4) if request.param == "identity" else np.diag([-1, -1, 1, 1]))


def test_blank_header_is_not_guessed(blank: Path):
    refuse(blank, r"blank header .* pass --spacing X Y Z, or --metadata CSV")
    refuse(blank, "blank header", ReadOptions(orientation="as-stored"))


def test_blank_header_with_spacing_is_read_as_stored(blank: Path, hounsfield: np.ndarray):
    volume = read_nifti(blank, options=ReadOptions(spacing=(0.7, 2.5)))
    np.testing.assert_array_equal(volume.stored, hounsfield)
    assert volume.spacing_hwd_mm == (0.7, 0.7, 2.5)


METADATA = ("VolumeName,Manufacturer,RescaleIntercept,RescaleSlope,XYSpacing,ZSpacing\n"
            'other.nii,X,0,1,"[1.0, 1.0]",1\n'
            'train_1_a_1.nii,X,{intercept},{slope},"{xy}",{z}\n')


def metadata_csv(folder: Path, intercept="-1024", slope="1.0", xy="[0.683594, 0.683594]", z="1.5") -> Path:
    path = folder / "metadata.csv"
    path.write_text(METADATA.format(intercept=intercept, slope=slope, xy=xy, z=z))
    return path


def test_metadata_supplies_spacing_and_rescaling(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "train_1_a_1.nii", (hounsfield + 1024).astype(np.int16), np.eye(4))
    volume = read_nifti(path, options=ReadOptions(metadata=metadata_csv(tmp_path)))
    np.testing.assert_array_equal(volume.hounsfield(volume.stored), hounsfield)
    assert volume.spacing_hwd_mm == (0.683594, 0.683594, 1.5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"xy": "broken"}, "XYSpacing is 'broken'; expected 2 numbers"),
    ({"xy": "[0.7]"}, "XYSpacing is .* expected 2 numbers"),
    ({"z": ""}, "ZSpacing is ''; expected 1 number"),
    ({"z": "-1"}, "expected positive spacing"),
    ({"slope": "0"}, "a slope other than 0"),
    ({"intercept": "nan"}, "RescaleIntercept is 'nan'"),
])
def test_unusable_metadata(changes, message: str, hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "train_1_a_1.nii", hounsfield, np.eye(4))
    refuse(path, message, ReadOptions(metadata=metadata_csv(tmp_path, **changes)))


def test_metadata_of_a_file_that_was_unpacked(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "train_1_a_1.nii", hounsfield, np.eye(4))
    csv = metadata_csv(tmp_path, intercept="0")
    csv.write_text(csv.read_text().replace("train_1_a_1.nii", "train_1_a_1.nii.gz"))
    assert read_nifti(path, options=ReadOptions(metadata=csv)).spacing_hwd_mm[2] == 1.5


def test_metadata_without_the_volume_or_column(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "b.nii", hounsfield, np.eye(4))
    refuse(path, "no row with VolumeName 'b.nii'", ReadOptions(metadata=metadata_csv(tmp_path)))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no column VolumeName"):
        read_nifti(path, options=ReadOptions(metadata=tmp_path / "other.csv"))


# ---------------------------------------------------------------- bad files


def test_no_such_file_and_folder(tmp_path: Path):
    refuse(tmp_path / "none.nii.gz", "no such scan")
    refuse(tmp_path, "found a folder")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.nii.gz", b"not gzip at all", "not a NIfTI file"),
    ("a.nii.gz", gzip.compress(b"x" * 1000, mtime=0), "not a NIfTI file"),
    ("a.nii", b"x" * 1000, "not a NIfTI file"),
    ("a.nii", b"", "not a NIfTI file"),
    ("a.nii.gz", b"", "not a NIfTI file"),
    ("a.txt", b"hello", "neither NIfTI by its name nor DICOM"),
])
def test_not_nifti(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, message)


def test_truncated_gzip(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii.gz", hounsfield)
    whole = path.read_bytes()
    for share in (0.9, 0.5, 0.02):
        path.write_bytes(whole[: int(len(whole) * share)])
        refuse(path, "truncated|header is damaged")


def test_flipped_bit_fails_the_checksum(hounsfield: np.ndarray, tmp_path: Path):
    """gzip compares its checksum only at the end of the stream, which a reader of the voxels alone never reaches."""
    path = write(tmp_path / "a.nii", hounsfield)
    stored = bytearray(gzip.compress(path.read_bytes(), compresslevel=0))
    stored[len(stored) // 2] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(stored)
    refuse(tmp_path / "a.nii.gz", "damaged gzip stream .*CRC")


def test_truncated_uncompressed(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii", hounsfield)
    path.write_bytes(path.read_bytes()[:-10])
    refuse(path, "truncated: .* bytes, the header needs")


def test_header_for_another_file(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii", np.zeros((200, 200, 40), np.int16), dim=[3, 20, 20, 40, 1, 1, 1, 1])
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("a.nii", "a.nii.gz"):
        refuse(tmp_path / name, "bytes follow the .* the header does not describe this file")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_voxel_limit_is_checked_before_allocation(suffix: str, tmp_path: Path):
    path = write(tmp_path / "a.nii", np.zeros((4, 4, 4), np.int16), dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])
    if suffix == ".nii.gz":
        (tmp_path / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    refuse(tmp_path / f"a{suffix}", r"claims 35,181,150,961,663 voxels .* the limit is 1,073,741,824")


@pytest.mark.parametrize(("shape", "message"), [
    ((40, 36), "2-D of shape"), ((40,), "1-D of shape"), ((8, 8, 8, 2), "holds 2 volumes"),
    ((8, 8, 8, 1, 3), "holds 3 volumes"),
])
def test_dimensions(shape, message: str, tmp_path: Path):
    refuse(write(tmp_path / "a.nii.gz", np.zeros(shape, np.int16)), message)


def test_negative_dimension(tmp_path: Path):
    path = write(tmp_path / "a.nii", np.zeros((4, 4, 4), np.int16), dim=[3, 4, -4, 4, 1, 1, 1, 1])
    refuse(path, "empty axis|damaged")


@pytest.mark.parametrize("dtype", [[("R", "u1"), ("G", "u1"), ("B", "u1")], np.complex64])
def test_colour_and_complex_voxels(dtype, tmp_path: Path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), dtype), LPS_AFFINE), tmp_path / "a.nii")
    refuse(tmp_path / "a.nii", "RGB colour" if isinstance(dtype, list) else "complex64")


@pytest.mark.parametrize("spacing", [0.0, -0.7, float("nan"), float("inf")])
def test_impossible_spacing_in_the_header(spacing: float, hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii", hounsfield, pixdim=[1, 0.9, spacing, 1.7, 0, 0, 0, 0])
    refuse(path, "spacing in the header is 0.9 x .* expected positive numbers")
    assert read_nifti(path, options=EXPLICIT).spacing_hwd_mm == (1, 1, 1)


@pytest.mark.parametrize("spacing", [(0, 1, 1), (1, -1, 1), (1, float("nan"), 1), (1,), (1, 1, 1, 1)])
def test_impossible_given_spacing(spacing):
    with pytest.raises(InputError, match="spacing"):
        ReadOptions(spacing=spacing)


@pytest.mark.parametrize("options", [{"slope": 0}, {"slope": float("nan")}, {"intercept": float("inf")}])
def test_impossible_given_rescaling(options):
    with pytest.raises(InputError, match="slope|intercept"):
        ReadOptions(**options)


def test_header_that_contradicts_itself(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii", hounsfield, pixdim=[1, 0.9, 0.8, 3.4, 0, 0, 0, 0], qform_code=0)
    refuse(path, "pixdim says 0.9 x 0.8 x 3.4 mm, the affine 0.9 x 0.8 x 1.7 mm")


def test_units_other_than_millimetres(hounsfield: np.ndarray, tmp_path: Path):
    refuse(write(tmp_path / "a.nii", hounsfield, xyzt_units=3), "spatial unit is code 3, not millimetres")


def test_singular_affine(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii", hounsfield, srow_x=[0, 0, 0, 0], qform_code=0)
    refuse(path, "singular")


def test_directions_are_not_guessed_from_a_singular_affine(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii", hounsfield, srow_x=[0, 0, 0, 0], qform_code=0)
    refuse(path, "gives no direction for one of the axes; pass --orientation as-stored", EXPLICIT)
    read_nifti(path, options=ReadOptions(spacing=(1, 1, 1), orientation="as-stored"))


@pytest.mark.parametrize("spacing", [0.7, 0.6, 0.683594, 1.25])
def test_header_and_csv_give_the_same_spacing(spacing: float, hounsfield: np.ndarray, tmp_path: Path):
    """A header holds float32; a difference in the eighth digit can cost a slice in int(size * spacing / target)."""
    path = write(tmp_path / "a.nii.gz", hounsfield, np.diag([-spacing, -spacing, spacing, 1]))
    assert read_nifti(path).spacing_hwd_mm == (spacing,) * 3


@pytest.mark.parametrize("offset", [1e12, 1e20, float("inf"), float("nan"), -5.0])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_impossible_offset_of_the_voxels(offset: float, suffix: str, hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii", hounsfield, vox_offset=offset)
    if suffix == ".nii.gz":
        (tmp_path / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    refuse(tmp_path / f"a{suffix}", "damaged|at byte|truncated")


def test_unknown_orientation_option(hounsfield: np.ndarray, tmp_path: Path):
    with pytest.raises(InputError, match="orientation: 'RAS'; expected 'LPS'"):
        read_nifti(write(tmp_path / "a.nii", hounsfield), options=ReadOptions(orientation="RAS"))


def test_unusable_file_scaling(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii", hounsfield, scl_slope=1.0, scl_inter=float("inf"))
    refuse(path, "scl_inter|header is damaged")


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite(value: float, hounsfield: np.ndarray, tmp_path: Path):
    array = hounsfield.astype(np.float32)
    array[3, 4, 5] = array[1, 1, 1] = value
    refuse(write(tmp_path / "a.nii.gz", array), "2 voxels are NaN or infinite")


def test_constant_volume_is_allowed(tmp_path: Path):
    for value in (0, -1000, 5000, -30000):
        read_nifti(write(tmp_path / "a.nii.gz", np.full((9, 9, 9), value, np.int16)))


@pytest.mark.parametrize(("change", "message"), [
    (lambda hu: hu + 1024, "slope and intercept were probably not applied. Pass --slope and --intercept"),
    (lambda hu: hu + 8192, "probably not applied"),
    (lambda hu: hu - 1024, "lighter than air .* slope and intercept were probably applied twice"),
    (lambda hu: (hu + 1000) / 1200.0, "probably not applied"),
    (lambda hu: hu.astype(np.int32) * 64, "too varied to be padding"),
    (lambda hu: np.random.default_rng(0).uniform(-5000, 5000, hu.shape), "too varied to be padding"),
    (lambda hu: np.where(hu == hu.max(), 100_000, hu.astype(np.int32)), "more than a CT can hold"),
])
def test_values_that_cannot_be_hounsfield_units(change, message: str, hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii.gz", change(hounsfield))
    refuse(path, message)
    with pytest.warns(HounsfieldWarning, match="used all the same"):
        read_nifti(path, options=ReadOptions(slope=1, intercept=0))


def test_rescaled_file_with_the_metadata_of_the_stored_values(hounsfield: np.ndarray, tmp_path: Path):
    """CT-RATE's second edition is in HU already, and its metadata still lists the intercept."""
    path = write(tmp_path / "train_1_a_1.nii", hounsfield)
    refuse(path, "probably applied twice", ReadOptions(metadata=metadata_csv(tmp_path)))


def padded(hu: np.ndarray, *values: int) -> np.ndarray:
    """An eighth of the volume for each value filled, as scanners fill what they did not see."""
    array = hu.astype(np.float32)
    width = len(array) // 8
    for index, value in enumerate(values):
        array[index * width : (index + 1) * width] = value
    return array


@pytest.mark.parametrize("change", [
    lambda hu: padded(hu, -3024),
    lambda hu: padded(hu, -2000, -3024),
    # A spline rings at the border of the padding, and only there: a volume of a real scan's size.
    lambda hu: ndimage.zoom(padded(ndimage.zoom(hu, 3, order=0), -3024), 1.1, order=3),
    lambda hu: ndimage.rotate(padded(hu, -3024), 10, reshape=False, order=1, cval=-2000),
    lambda hu: np.where(np.arange(hu.shape[2]) == 3, np.minimum(padded(hu, -2000), -2400), padded(hu, -2000)),
    lambda hu: np.clip(hu * 1.0, -1000, 200),
    lambda hu: np.where(hu > 200, 28_000, hu.astype(np.int32)),  # metal
], ids=["padded", "two values", "spline", "rotated", "one dark slice", "windowed", "metal"])
def test_odd_scans_that_are_right(change, hounsfield: np.ndarray, tmp_path: Path):
    read_nifti(write(tmp_path / "a.nii.gz", change(hounsfield)))


@pytest.mark.parametrize("change", [
    lambda raw: padded(raw, -2000),
    # Linear resampling blends padding into the range of air, at the border only: a volume of a real scan's size.
    lambda raw: ndimage.zoom(padded(ndimage.zoom(raw, 4, order=0), -2000), 1.1, order=1),
    lambda raw: np.where(np.arange(raw.size).reshape(raw.shape) == 77, -250, raw),
], ids=["padded", "resampled", "stray voxel"])
def test_odd_scans_that_were_not_rescaled(change, hounsfield: np.ndarray, tmp_path: Path):
    refuse(write(tmp_path / "a.nii.gz", change((hounsfield + 1024).astype(np.int16))), "probably not applied")


def test_padded_scan_that_was_rescaled_twice(hounsfield: np.ndarray, tmp_path: Path):
    refuse(write(tmp_path / "a.nii.gz", padded(hounsfield, -2000) - 1024), "probably applied twice")


def test_overflowing_file_scaling(hounsfield: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii", hounsfield.astype(np.float64) * 1e300)
    edit_header(path, scl_slope=struct.unpack("f", struct.pack("f", 1e38))[0], scl_inter=0.0)
    refuse(path, "scaling overflows|more than a CT|lighter than air")
