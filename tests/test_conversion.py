"""dicom2npy.py and nii2npy.py together: NIH's two layouts, and what a killed conversion leaves."""

import numpy as np
from raw_scans import convert, loaded, make_slices, random_volume, write_nifti, write_slices

from scans.converting import convert_all


def test_both_NIH_layouts_without_arguments(tmp_path):
    old, new = random_volume(1), random_volume(2, (4, 7, 3))
    label_old, label_new = (
        np.random.default_rng(i).integers(0, 2, s, np.uint8) for i, s in ((3, (6, 5, 4)), (4, (4, 7, 3)))
    )
    write_slices(tmp_path / 'DOI/PANCREAS_0001/1.2.3/4.5.6', make_slices(old))
    write_slices(tmp_path / 'manifest-1/Pancreas-CT/PANCREAS_0002/DATE-CT/1.0-A', make_slices(new, intercept=0))
    for number, label in enumerate((label_old, label_new, label_old), 1):  # 0003: withdrawn, only its label remains
        write_nifti(
            tmp_path / f'TCIA_pancreas_labels-02-05-2017/label000{number}.nii.gz', label.transpose(1, 0, 2), code=0
        )

    said, _ = convert('dicom2npy.py', cwd=tmp_path)
    images = loaded(tmp_path, 'images')
    assert list(images) == ['0001', '0002'] and all(image.dtype == np.int16 for image in images.values())
    np.testing.assert_array_equal(images['0001'], old)
    np.testing.assert_array_equal(images['0002'], new)
    assert said.splitlines()[0].startswith('0001: image 6 x 5 x 4, 2 x 3 x 5 mm') and len(said.splitlines()) == 2

    said, _ = convert('nii2npy.py', cwd=tmp_path)
    labels = loaded(tmp_path, 'labels')
    assert list(labels) == ['0001', '0002'] and all(label.dtype == np.uint8 for label in labels.values())
    np.testing.assert_array_equal(labels['0001'], label_old)
    np.testing.assert_array_equal(labels['0002'], label_new)
    assert 'by transpose(1, 0, 2)' in said and '0003: a label without an image, skipped' in said


def test_only_what_a_killed_conversion_has_left_is_removed(tmp_path):
    for folder in ('raw', 'images', 'imagesTr'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / '.my notes.part').touch()
        (tmp_path / folder / '.0001.npy.77.part').touch()
    convert_all(tmp_path, {}, None)
    assert [path.parent.name for path in sorted(tmp_path.rglob('.0001*'))] == ['imagesTr', 'raw']
    assert len(list(tmp_path.rglob('.my notes.part'))) == 3
