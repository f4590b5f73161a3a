"""DICOM segmentation objects, written by highdicom: an optional package, imported only here."""

import re
import warnings

import numpy as np
import pydicom
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from running.files import atomic_write
from running.results import revision
from scans.dicom import ordered_slices

NEEDED = ('StudyInstanceUID', 'SeriesInstanceUID', 'SOPInstanceUID', 'FrameOfReferenceUID')
OPTIONAL = 'PatientID PatientName PatientBirthDate PatientSex StudyID StudyDate StudyTime AccessionNumber'.split()
SIDES = {'right': Code('24028007', 'SCT', 'Right'), 'left': Code('7771000', 'SCT', 'Left')}
UNNAMED = codes.SCT.AnatomicalStructure
HIGHDICOM = 'highdicom==0.28.2'


def is_dicom_name(path):
    """Return whether a path ends like a DICOM file."""
    return str(path).endswith('.dcm')


def import_highdicom():
    """Return the package; raise ValueError that says how to install it where it is missing."""
    try:
        import highdicom
    except ImportError:
        raise ValueError(f'writing DICOM needs highdicom; install it with: pip install {HIGHDICOM}') from None
    warnings.filterwarnings('ignore', module='highdicom')  # of patients' names as they are in the series
    return highdicom


# --- writing -------------------------------------------------------------------------------------------------------


class SegmentedSeries:
    """A DICOM series that a segmentation object is to refer to; ValueError where that is not possible."""

    def __init__(self, folder):
        self.slices = ordered_slices(folder, say=lambda note: None)  # reading the scan has printed the notes
        files = list(dict.fromkeys(s.path for s in self.slices))
        self.headers = [read_header(path) for path in files]
        first, last, hd = self.slices[0], self.slices[-1], import_highdicom()
        lost = [name for name in NEEDED if not self.headers[0].get(name)]
        lost += ['ImagePositionPatient'] if first.position is None else []
        if lost:
            raise ValueError(
                f'{first.path}: no {lost[0]} in its header, so no DICOM segmentation can refer to it; write .nii.gz'
            )
        step = float(np.linalg.norm(last.position - first.position)) / max(len(self.slices) - 1, 1) or first.thickness
        self.measures = hd.PixelMeasuresSequence(first.spacing, slice_thickness=step, spacing_between_slices=step)
        for header in self.headers:  # what highdicom reads there, though it is given the measures
            if 'NumberOfFrames' in header:
                header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = self.measures
            else:
                header.SliceThickness, header.ImageOrientationPatient = step, self.headers[0].ImageOrientationPatient
        try:
            self.build(np.zeros((*first.size, len(self.slices)), np.uint8), {1: ('', UNNAMED, None)})
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f'{folder}: highdicom cannot write a segmentation of this series ({error})') from None

    def write(self, path, mask, organs):
        """Write a mask as a binary segmentation object; see `build`."""
        with atomic_write(path) as file:
            self.build(mask, organs).save_as(file)

    def build(self, mask, organs):
        """Return the highdicom Segmentation of a mask (rows, columns, slices), in the order of the slices.

        mask: organ numbers, uint8; organs: {number: (name, Code, its side or None)}, a segment each.
        Slices without an organ are left out, as is usual, unless all are.
        """
        hd, segments = import_highdicom(), np.zeros((len(self.slices), *mask.shape[:2]), np.uint8)
        for place, s in enumerate(self.slices):
            for number, organ in enumerate(organs, 1):
                segments[place if s.frame is None else s.frame][mask[:, :, place] == organ] = number
        found = hd.seg.Segmentation(
            source_images=self.headers,
            pixel_array=segments,
            segmentation_type='BINARY',
            omit_empty_frames=bool(mask.any()),
            pixel_measures=self.measures,
            segment_descriptions=[describe(hd, n, *organ) for n, organ in enumerate(organs.values(), 1)],
            series_instance_uid=hd.UID(),
            series_number=100,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer='OrganSegRSTN',
            manufacturer_model_name='Recurrent Saliency Transformation Network',
            software_versions=revision(),
            device_serial_number='0',
            series_description='OrganSegRSTN',
            content_label='SEGMENTATION',
            content_description='Organs found by OrganSegRSTN',
        )
        for (_, _, side), item in zip(organs.values(), found.SegmentSequence):
            if side:
                modifier = [hd.sr.CodedConcept(*side[:3])]
                item.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = modifier
        return found


def read_header(path):
    """Return the header of a DICOM file; what highdicom copies of patient and study is there, or empty."""
    header = pydicom.dcmread(path, stop_before_pixels=True)
    for name in OPTIONAL:
        header.setdefault(name, '')
    return header


def describe(hd, number, name, code, _side):
    """Return the highdicom description of a segment."""
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64] or 'organ',
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=code,
        algorithm_type='AUTOMATIC',
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name='OrganSegRSTN', family=codes.DCM.ArtificialIntelligence, version=revision()
        ),
    )


# --- codes ---------------------------------------------------------------------------------------------------------


def organ_code(text):
    """Return (Code, its side as Code or None) of an organ.

    text: a name in pydicom's dictionary of SNOMED CT, such as pancreas or `right parotid gland`, or
    VALUE:SCHEME:MEANING, such as 15776009:SCT:Pancreas. ValueError: neither.
    """
    parts = [part.strip() for part in text.split(':')]
    if len(parts) == 3 and all(parts):
        return Code(*parts), None
    side, _, name = text.partition(' ') if text.lower().startswith(('left ', 'right ')) else ('', '', text)
    found = _known_names().get(_plain(name))
    if found is None:
        raise ValueError(f"{text!r}: not an organ in pydicom's SNOMED CT; give its code as 15776009:SCT:Pancreas")
    return found, SIDES.get(side.lower())


def _known_names():
    return {_plain(name): getattr(codes.SCT, name) for name in dir(codes.SCT) if name[0].isupper()}


def _plain(name):
    return re.sub('[^a-z0-9]', '', name.lower())
