"""Raw scans for the tests: DICOM and NIfTI files made here, and conversions of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get('RSTN_SHARED', REPO.parent / 'shared'))
DICOM2NPY, NII2NPY = '../DATA2NPY/dicom2npy.py', '../DATA2NPY/nii2npy.py'  # for the fixture `call`
AXIAL = [1, 0, 0, 0, 1, 0]
BOMB = 300 << 20  # bytes that some hundred kB unpack to


def random_volume(seed=0, shape=(6, 5, 4)):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def zeros(size, packer):
    """Return `size` zeros, compressed by `packer`."""
    chunk = bytes(1 << 20)
    return b''.join([packer.compress(chunk) for _ in range(size >> 20)] + [packer.flush()])


# --- DICOM series --------------------------------------------------------------------------------------------------


def make_slices(volume, orientation=AXIAL, start=(-10, -20, 50), spacing=(2.0, 3.0, 5.0), intercept=-1024, **tags):
    """Return DICOM slices of a volume (rows, columns, slices) in HU, stacked downwards as in NIH."""
    across, down = np.array(orientation, float).reshape(2, 3)
    series, slices = generate_uid(), []
    for k in range(volume.shape[2]):
        s = Dataset()
        s.SOPClassUID, s.SOPInstanceUID, s.SeriesInstanceUID, s.Modality = CTImageStorage, generate_uid(), series, 'CT'
        s.InstanceNumber, s.ImageOrientationPatient, s.PixelSpacing = k + 1, list(orientation), list(spacing[:2])
        s.ImagePositionPatient = list(np.array(start) - k * spacing[2] * np.cross(across, down))
        s.Rows, s.Columns, s.SamplesPerPixel, s.PhotometricInterpretation = *volume.shape[:2], 1, 'MONOCHROME2'
        s.BitsAllocated, s.BitsStored, s.HighBit, s.PixelRepresentation = 16, 16, 15, 1
        s.RescaleSlope, s.RescaleIntercept = 1, intercept
        s.PixelData = (volume[:, :, k] - intercept).astype('<i2').tobytes()
        s.file_meta = FileMetaDataset()
        s.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        for tag, value in tags.items():
            setattr(s, tag, value)
        slices.append(s)
    return slices


def enhanced(slices, frames=1):
    """Return slices as Enhanced CT, with functional groups: a file for each, or one."""
    shared, groups = Dataset(), []
    for s in slices:
        own = Dataset()
        for sequence, tags in {
            'PlanePositionSequence': ['ImagePositionPatient'], 'PlaneOrientationSequence': ['ImageOrientationPatient'],
            'PixelMeasuresSequence': ['PixelSpacing'],
            'PixelValueTransformationSequence': ['RescaleSlope', 'RescaleIntercept'],
        }.items():  # fmt: skip
            item = Dataset()
            for tag in tags:
                setattr(item, tag, getattr(s, tag))
                delattr(s, tag)
            setattr(shared if tags[0] in ('PixelSpacing', 'ImageOrientationPatient') else own, sequence, [item])
        groups.append(own)
    pixels = [s.PixelData for s in slices]
    if frames > 1:
        slices, groups, pixels = slices[:1], [groups], [b''.join(pixels)]
    for s, own, data in zip(slices, groups, pixels):
        s.SOPClassUID, s.NumberOfFrames, s.PixelData = EnhancedCTImageStorage, frames, data
        s.SharedFunctionalGroupsSequence = [shared]
        s.PerFrameFunctionalGroupsSequence = own if isinstance(own, list) else [own]
    return slices


def write_slices(folder, slices):
    """Write slices under names whose order is not that of their InstanceNumbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, s in enumerate(slices):
        s.save_as(folder / f'{(7 * i) % 1000:03}.dcm', enforce_file_format=True)


# --- NIfTI files ---------------------------------------------------------------------------------------------------


def write_nifti(path, array, affine=None, code=1):
    """Write an array with its affine as sform and qform of this code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    image.set_sform(image.affine, code)
    image.set_qform(image.affine, code)
    nib.save(image, path)


# --- the conversion scripts ----------------------------------------------------------------------------------------


def convert(script, *arguments, cwd=None, status=0):
    """Run a script; return its stdout and stderr. `status` is the exit code to expect."""
    command = [sys.executable, REPO / 'DATA2NPY' / script, *arguments]
    ran = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert ran.returncode == status, ran.stdout + ran.stderr
    assert 'Traceback' not in ran.stderr
    return ran.stdout, ran.stderr


def converted(call, tmp_path, script=DICOM2NPY):
    """Convert raw/, whose one case fails; return its error line; nothing may be left of it."""
    done = call(script, tmp_path / 'raw', tmp_path / 'out')
    assert 'Traceback' not in done.out + done.err
    lines = [line for line in done.out.splitlines() if ': error: ' in line]
    assert done.code == 1 and len(lines) == 1, done.out + done.err
    assert done.err.splitlines() == ['1 of 1 cases failed:', lines[0]]
    assert not list((tmp_path / 'out').rglob('*'))
    return lines[0]


def loaded(folder, kind):
    """Return {case: array} of images/ or labels/; nothing but whole .npy files may be there."""
    files = sorted(Path(folder, kind).iterdir()) if Path(folder, kind).exists() else []
    return {file.name.removesuffix('.npy'): np.load(file) for file in files}


def geometry(folder, case):
    return json.loads(Path(folder, 'geometry', f'{case}.json').read_text())
