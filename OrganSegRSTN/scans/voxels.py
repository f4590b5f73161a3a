"""The voxels of a scan: HU as int16 for an image, whole numbers as uint8 for a label; one slice in memory at a time."""

import numpy as np

DEFLATE_AT_BEST = 1100  # no gzip file, and no compressed slice of a scan, unpacks to more than this many times its size
AIR = -200  # HU; every CT scan falls below it somewhere
SLICES_AT_ONCE = 32  # slices that are turned at a time: one by one costs a cache miss a voxel


def stack_slices(planes, size, source, say):
    """Return an image (rows, columns, slices) int16 of `size` (slices, rows, columns) from its planes (rows, columns).

    Values are rounded and clipped to int16; `say` prints a line where that changed them. ValueError: NaN or infinite.
    """
    image, notes = np.empty((*size[1:], size[0]), np.int16), {}
    block = np.empty((SLICES_AT_ONCE, *size[1:]), np.int16)
    limits = np.iinfo(np.int16)
    for k, plane in enumerate(planes):
        if not np.isfinite(plane).all():
            raise ValueError(f'{source}: slice {k} holds values that are not finite (NaN or infinite)')
        whole = np.rint(plane)
        place = k % SLICES_AT_ONCE
        block[place] = np.clip(whole, limits.min, limits.max)
        if np.abs(whole - plane).max() > 1e-3:
            notes['values rounded to whole HU'] = True
        if (block[place] != whole).any():
            notes[f'values beyond {limits.min} to {limits.max} HU cut off there'] = True
        if place == SLICES_AT_ONCE - 1 or k == size[0] - 1:
            image[:, :, k - place : k + 1] = block[: place + 1].transpose(1, 2, 0)
    for note in notes:
        say(note)
    return image


def intensity_doubts(image, low_range, high_range):
    """Return what speaks against `image` (any shape) being a CT scan in HU that suits the window: a list of sentences."""
    low, high = image.min(), image.max()
    doubts = []
    if low >= 0 and high <= 255:
        doubts.append(f'values from {low} to {high}: a picture of 8 bit, not HU')
    elif low > AIR:
        doubts.append(
            f'no value below {AIR} HU, not even air: another modality, clipped, or without its intercept (-1024)'
        )
    clipped = share_outside(image, low_range, high_range)
    if clipped > 0.97:
        doubts.append(f'{clipped:.1%} of its voxels lie outside the intensity window, {low_range:g} to {high_range:g}')
    return doubts


def share_outside(image, low_range, high_range):
    """Return the share of voxels outside the intensity window."""
    return 1 - np.count_nonzero((image >= low_range) & (image <= high_range)) / image.size
