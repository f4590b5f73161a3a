"""predict.py OUTPUT.dcm: DICOM segmentation objects, read back with highdicom and with pydicom alone."""

import shutil
import subprocess
import sys

import numpy as np
import pydicom
import pytest
from conftest import run_script
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid
from raw_scans import AXIAL, SHARED, enhanced, make_slices, write_slices
from test_predict import loaded_once, make_scan, mask_of, save_snapshots  # noqa: F401
from test_segment import save_organs

from scans.dicom import read_series
from scans.geometry import place_label
from scans.nifti import open_nifti
from scans.segmentation import UNNAMED, SegmentedSeries, organ_code

SAGITTAL = [0, 1, 0, 0, 0, -1]
OBLIQUE = [0.8, 0.6, 0, -0.36, 0.48, 0.8]
LPS = np.diag([-1, -1, 1, 1])  # from RAS


@pytest.fixture(scope='module')
def highdicom():
    return pytest.importorskip('highdicom', reason='highdicom is missing: pip install highdicom==0.28.2')


@pytest.fixture(scope='module')
def snapshots(tmp_path_factory):
    return save_snapshots(tmp_path_factory.mktemp('data') / 'models/snapshots/SIJ_training_1e-5x10,4')


def write_series(folder, image=None, orientation=AXIAL, backwards=False, frames=1, **tags):
    """A series that a segmentation can refer to."""
    tags = {'StudyInstanceUID': generate_uid(), 'FrameOfReferenceUID': generate_uid()} | tags
    slices = make_slices(make_scan()[0] if image is None else image, orientation, spacing=(3.0, 2.0, 5.0), **tags)
    if backwards:
        for s in slices:
            s.InstanceNumber = len(slices) + 1 - s.InstanceNumber
    write_slices(folder, enhanced(slices, frames) if frames > 1 else slices)
    return folder


def places(array, affine):
    """Where the voxels of an array are, a sorted array (N, 3) in mm."""
    found = np.argwhere(array) @ affine[:3, :3].T + affine[:3, 3]
    return found[np.lexsort(np.round(found, 2).T)]


def frames_of(path, number):
    """{(SOPInstanceUID, frame) that a frame refers to: (position, pixels)} of a segment, by pydicom alone."""
    seg, found = pydicom.dcmread(path), {}
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for frame, group in zip(pixels, seg.PerFrameFunctionalGroupsSequence):
        identified = group if 'SegmentIdentificationSequence' in group else seg.SharedFunctionalGroupsSequence[0]
        if identified.SegmentIdentificationSequence[0].ReferencedSegmentNumber == number:
            source = group.DerivationImageSequence[0].SourceImageSequence[0]
            key = source.ReferencedSOPInstanceUID, source.get('ReferencedFrameNumber')
            found[key] = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float), frame
    return found


def check(highdicom, folder, path, mask, numbers):
    """A segmentation of a series holds the organs `numbers` of a mask, (rows, columns, slices) as the series is read."""
    geometry = read_series(folder, say=lambda note: None).geometry
    sources = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    seg = highdicom.seg.segread(path)
    assert seg.number_of_segments == len(numbers)
    assert seg.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
    assert seg.StudyInstanceUID == sources[0].StudyInstanceUID
    assert seg.SeriesInstanceUID != sources[0].SeriesInstanceUID
    for segment, number in enumerate(numbers, 1):
        expected = places(mask == number, LPS @ geometry.affine)
        volume = seg.get_volume(segment_numbers=[segment], combine_segments=False)
        np.testing.assert_allclose(places(volume.array[..., 0], volume.affine), expected, atol=0.01)
        across, down = np.reshape(seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
                                  .ImageOrientationPatient, (2, 3)).astype(float)  # fmt: skip
        spacing = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
        found, axes = [], np.stack([down * spacing[0], across * spacing[1]], axis=1)
        for position, pixels in frames_of(path, segment).values():
            found += [position + axes @ index for index in np.argwhere(pixels)]
        found = np.array(found).reshape(-1, 3)
        np.testing.assert_allclose(found[np.lexsort(np.round(found, 2).T)], expected, atol=0.01)
    return sources, seg


@pytest.mark.parametrize('backwards', [False, True])
@pytest.mark.parametrize('orientation', [AXIAL, SAGITTAL, OBLIQUE], ids=['axial', 'sagittal', 'oblique'])
def test_the_same_voxels_at_the_same_places(orientation, backwards, highdicom, tmp_path):
    folder = write_series(tmp_path / 'series', orientation=orientation, backwards=backwards)
    shape = read_series(folder, say=lambda note: None).image.shape
    mask = np.random.default_rng(0).choice([0, 0, 1, 3], shape).astype(np.uint8)
    mask[:, :, 1] = 0
    organs = {1: ('pancreas', *organ_code('pancreas')), 3: ('other', UNNAMED, None)}
    SegmentedSeries(folder).write(tmp_path / 'mask.dcm', mask, organs)
    sources, _ = check(highdicom, folder, tmp_path / 'mask.dcm', mask, [1, 3])
    by_uid = {source.SOPInstanceUID: source for source in sources}
    found = frames_of(tmp_path / 'mask.dcm', 1)
    assert len(found) == shape[2] - 1, 'the empty slice is left out'
    for (uid, _), (position, _) in found.items():
        np.testing.assert_allclose(position, np.array(by_uid[uid].ImagePositionPatient, float))


def test_frames_of_an_enhanced_series_are_referred_to_one_by_one(highdicom, tmp_path):
    folder = write_series(tmp_path / 'series', frames=6)
    mask = np.random.default_rng(0).integers(0, 2, (9, 8, 6)).astype(np.uint8)
    SegmentedSeries(folder).write(tmp_path / 'mask.dcm', mask, {1: ('a', UNNAMED, None)})
    check(highdicom, folder, tmp_path / 'mask.dcm', mask, [1])
    assert {frame for _, frame in frames_of(tmp_path / 'mask.dcm', 1)} == {1, 2, 3, 4, 5, 6}


def test_predict_writes_the_mask_that_it_writes_as_NIfTI(highdicom, snapshots, tmp_path):
    folder = write_series(tmp_path / 'study/series', PatientID='a', PatientName='A^B')
    out, options = tmp_path / 'mask.dcm', ['--device', 'cpu', '--rounds', 1]
    done = run_script('predict.py', tmp_path / 'study', out, *snapshots, *options, '--code', 'right parotid gland')
    assert done.code == 0, done.err
    assert run_script('predict.py', folder, tmp_path / 'm.nii', *snapshots, *options).code == 0
    mask = mask_of(tmp_path / 'm.nii').transpose(1, 0, 2)
    assert mask.any()
    _, seg = check(highdicom, folder, out, mask, [1])
    assert (seg.PatientID, seg.PatientName) == ('a', 'A^B')
    segment = seg.SegmentSequence[0]
    kind = segment.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ('45289007', 'SCT')
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == 'Right'
    assert (segment.SegmentLabel, segment.SegmentAlgorithmType) == ('right parotid gland', 'AUTOMATIC')


def test_several_organs_are_segments_and_a_folder_of_series_one_file_each(highdicom, tmp_path, call):
    folder = save_organs(tmp_path / 'SIJ_training_1e-5x10,4', 1, 2)
    for name in ('anna', 'bert'):
        write_series(tmp_path / 'scans' / name)
    (tmp_path / 'scans/cara.nii').touch()
    arguments = [tmp_path / 'scans', tmp_path / 'out', '--organs', folder, '--rounds', 0, '--device', 'cpu']
    done = call('predict.py', *arguments, '--dicom', '--code', '2=spleen')
    assert done.code == 1 and len(done.err.splitlines()) == 2, done.err
    assert 'cara.nii: a DICOM mask refers to a DICOM series' in done.err
    (tmp_path / 'scans/cara.nii').unlink()
    assert call('predict.py', *arguments[:1], tmp_path / 'nifti', *arguments[2:]).code == 0
    for name in ('anna', 'bert'):
        mask = mask_of(tmp_path / f'nifti/{name}.nii.gz').transpose(1, 0, 2)
        _, seg = check(highdicom, tmp_path / 'scans' / name, tmp_path / f'out/{name}.dcm', mask, [1, 2])
        assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ['organ 1', 'spleen']
    assert call('predict.py', *arguments, '--dicom', '--code', '2=spleen').out.count('(done before)') == 2
    assert 'made with other settings (code 2)' in call('predict.py', *arguments, '--dicom', '--code', '2=liver').err


def test_an_empty_mask_is_written_with_all_its_slices(highdicom, snapshots, tmp_path, call):
    folder = write_series(tmp_path / 'series', np.full((6, 5, 4), -900, np.int16))
    done = call('predict.py', folder, tmp_path / 'mask.dcm', *snapshots, '--device', 'cpu')
    assert done.code == 0 and 'the mask is empty' in done.out, done.err
    seg = pydicom.dcmread(tmp_path / 'mask.dcm')
    assert seg.NumberOfFrames == 4 and not seg.pixel_array.any()


@pytest.mark.parametrize(
    ('tags', 'words'),
    [
        ({'FrameOfReferenceUID': None}, 'no FrameOfReferenceUID in its header'),
        ({'StudyInstanceUID': ''}, 'no StudyInstanceUID in its header'),
        ({'ImagePositionPatient': None}, 'no ImagePositionPatient in its header'),
    ],
)
def test_a_series_that_cannot_be_referred_to_is_refused_before_any_work(
    tags, words, highdicom, snapshots, tmp_path, call
):
    folder = write_series(tmp_path / 'series', **tags)
    done = call('predict.py', folder, tmp_path / 'mask.dcm', *snapshots, '--device', 'cpu')
    assert done.code == 1 and words in done.err and 'coarse:' not in done.out
    assert not (tmp_path / 'mask.dcm').exists()


def test_DICOM_out_needs_DICOM_in_and_a_code_an_organ(highdicom, snapshots, tmp_path, call):
    (tmp_path / 'scan.nii').touch()
    done = call('predict.py', tmp_path / 'scan.nii', tmp_path / 'mask.dcm', *snapshots)
    assert done.code == 1 and 'INPUT must be the folder of one' in done.err
    done = call('predict.py', tmp_path / 'scan.nii', tmp_path / 'mask.nii', *snapshots, '--code', 'liver')
    assert done.code == 1 and '--code goes with a DICOM mask' in done.err
    done = call('predict.py', tmp_path / 'scan.nii', tmp_path / 'mask.nii', *snapshots, '--dicom')
    assert done.code == 1 and '--dicom goes with a folder of scans' in done.err
    folder = write_series(tmp_path / 'series')
    for words, *code in (
        ("'gizzard': not an organ in pydicom's SNOMED CT", 'gizzard'),
        ('--code kidney: organ 1 has a code; put a name with a blank into quotes', 'left', 'kidney'),
    ):
        done = call('predict.py', folder, tmp_path / 'mask.dcm', *snapshots, '--code', *code)
        assert done.code == 1 and words in done.err
    done = call('predict.py', folder, tmp_path / 'm.dcm', '--organs', *snapshots, '--code', 'pancreas')
    assert done.code == 1 and 'give the number of an organ and its name: 1=pancreas' in done.err


@pytest.mark.parametrize(
    ('text', 'value', 'side'),
    [
        ('pancreas', '15776009', None),
        ('Parotid gland', '45289007', None),
        ('left kidney', '64033007', 'Left'),
        ('C3 vertebra', codes.SCT.C3Vertebra.value, None),
        ('left L1 vertebra', codes.SCT.L1Vertebra.value, 'Left'),
        ('12345:99MINE:My organ', '12345', None),
    ],
)
def test_names_and_codes_of_organs(text, value, side):
    code, found = organ_code(text)
    assert code.value == value and (found and found.meaning) == side


def test_without_highdicom_one_line_names_the_command(snapshots, tmp_path, call, monkeypatch):
    monkeypatch.setitem(sys.modules, 'highdicom', None)
    done = call('predict.py', write_series(tmp_path / 's'), tmp_path / 'mask.dcm', *snapshots)
    assert done.code == 1 and 'install it with: pip install highdicom==' in done.err.splitlines()[-1]


@pytest.mark.skipif(not shutil.which('dciodvfy'), reason='no dciodvfy: apt-get install dicom3tools')
@pytest.mark.parametrize('frames', [1, 6])
def test_dciodvfy_finds_no_error(frames, highdicom, tmp_path):
    folder = write_series(tmp_path / 'series', frames=frames, PatientID='a', StudyID='1', StudyDate='20260101',
                          StudyTime='120000')  # fmt: skip
    mask = np.random.default_rng(0).integers(0, 2, (9, 8, 6)).astype(np.uint8)
    SegmentedSeries(folder).write(tmp_path / 'mask.dcm', mask, {1: ('a', *organ_code('right parotid gland'))})
    done = subprocess.run(['dciodvfy', tmp_path / 'mask.dcm'], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == 'Segmentation\n'


@pytest.mark.skipif(not (SHARED / 'data').exists(), reason='no shared scans')
def test_a_real_series(highdicom, tmp_path):
    """The liver of a real series, whose label runs the other way; the series' own identifiers have been removed."""
    source, folder = SHARED / 'data/totalsegmentator_ct', tmp_path / 'series'
    folder.mkdir()
    study, series = generate_uid(), generate_uid()
    for file in sorted((source / 'example_ct_dicom').iterdir()):
        s = pydicom.dcmread(file)
        s.SOPClassUID, s.SOPInstanceUID = s.file_meta.MediaStorageSOPClassUID, s.file_meta.MediaStorageSOPInstanceUID
        s.StudyInstanceUID, s.SeriesInstanceUID = study, series
        s.save_as(folder / file.name)
    scan = read_series(folder, say=lambda note: None)
    label = open_nifti(source / 'example_seg_dicom.nii.gz')
    liver = place_label(label.label(), label.geometry, scan.image.shape, scan.geometry)[0] == 5
    assert scan.image[liver].mean() == pytest.approx(89, abs=5)
    SegmentedSeries(folder).write(tmp_path / 'liver.dcm', liver.astype(np.uint8), {1: ('liver', *organ_code('liver'))})
    check(highdicom, folder, tmp_path / 'liver.dcm', liver, [1])
