"""The 3D view of the report: what is packed for it, and its surfaces in a real browser."""

import base64
import json
from collections import Counter

import numpy as np
import pytest
from test_report import affine_of, browser, golden, golden_data, report  # noqa: F401

from reporting.surfaces import MOST_VOXELS, patient_axes, thinned, write_surfaces
from scans.geometry import Geometry

# ruff: noqa: F811 (the fixtures of test_report.py)
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:surface_distance')  # of scipy's old names
HEAD_DOWN = affine_of((0.8, 0.9, 2.5))  # rows to the back, columns to the left, slices down


def written(path, masks, geometry=None):
    """(ID, content, masks) of the script that is written for the page."""
    write_surfaces(path, 'a', masks, geometry)
    text = path.read_text()
    assert text.startswith('showSurfaces("a", ') and text.endswith(');\n')
    content = json.loads(text[len('showSurfaces("a", ') : -3])
    size = content['size']
    unpacked = {
        name: np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=np.prod(size)).reshape(size)
        for name, packed in content['masks'].items()
    }
    return content, unpacked


def ball(radius, shape, centre):
    places = np.indices(shape) - np.reshape(centre, (3, 1, 1, 1))
    return (places**2).sum(axis=0) <= radius**2


# --- packed --------------------------------------------------------------------------------------------------------


def test_the_joint_box_of_label_and_prediction_is_packed(tmp_path):
    rng = np.random.default_rng(0)
    label, prediction = np.zeros((2, 20, 21, 22), bool)
    label[3:9, 4:9, 5:9] = rng.random((6, 5, 4)) < 0.5
    prediction[5:11, 4:8, 6:12] = True
    label[3, 4, 5] = True
    coarse = np.ones_like(label)
    geometry = Geometry(HEAD_DOWN, 'position', 'x', 'DICOM')
    content, found = written(tmp_path / 'a.js', {'label': label, 'prediction': prediction, 'coarse': coarse}, geometry)
    np.testing.assert_array_equal(found['label'], label[3:11, 4:9, 5:12])
    np.testing.assert_array_equal(found['prediction'], prediction[3:11, 4:9, 5:12])
    assert set(found) == {'label', 'prediction'} and content['known']
    np.testing.assert_array_equal(content['axes'], HEAD_DOWN[:3, :3])


def test_empty_masks_are_one_voxel_that_is_not_set(tmp_path):
    _, found = written(tmp_path / 'a.js', {'label': np.zeros((9, 8, 7), bool)})
    np.testing.assert_array_equal(found['label'], np.zeros((1, 1, 1)))


def test_a_large_box_is_thinned_and_stays_far_below_3_MB(tmp_path):
    label = ball(110, (230, 230, 230), (115, 115, 115))
    content, found = written(tmp_path / 'a.js', {'label': label, 'prediction': ~label})
    assert content['size'] == [115, 115, 115]  # 230 by 2
    np.testing.assert_array_equal(np.abs(content['axes']).sum(axis=0), [2, 2, 2])
    assert found['label'].sum() * 8 == pytest.approx(label.sum(), rel=0.01)
    random = np.random.default_rng(0).random((200, 100, MOST_VOXELS // 20_000)) < 0.5
    random[[0, -1]] = True
    content, _ = written(tmp_path / 'a.js', {'label': random, 'prediction': ~random})
    assert content['size'] == [200, 100, 100] and (tmp_path / 'a.js').stat().st_size < 700_000


def test_a_block_is_set_where_half_of_it_is():
    mask = np.zeros((3, 2, 2), bool)
    mask[0] = True
    np.testing.assert_array_equal(thinned(mask, 2), [[[True]], [[False]]])
    np.testing.assert_array_equal(thinned(mask, 1), mask)


def test_without_a_position_the_axes_are_the_published_ones():
    np.testing.assert_array_equal(patient_axes(None), [[0, -1, 0], [-1, 0, 0], [0, 0, -1]])
    spaced = Geometry(np.diag([2.0, 3, 4, 1]), 'spacing', 'x', 'NIfTI')
    np.testing.assert_array_equal(patient_axes(spaced), [[0, -3, 0], [-2, 0, 0], [0, 0, -4]])


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture
def page(golden, report, browser):
    """page(masks, geometry) opens a report whose first case has these masks; -> its 3D figure, when it is drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    report(golden)

    def page(masks=None, geometry=None):
        path = golden / 'report/cases/run0_fold0_1_3d.js'
        assert path.stat().st_size < 3_000_000
        if masks:
            write_surfaces(path, 'run0_fold0_1', masks, geometry)
        browser.get((golden / 'report/index.html').as_uri())
        figure = browser.find_element('css selector', '#run0_fold0_1 .surfaces')
        browser.execute_script('arguments[0].scrollIntoView({block: "center"})', figure)
        WebDriverWait(browser, 20).until(lambda b: figure.get_attribute('data-shown'))
        return figure

    return page


def pixels(browser, figure):
    """The canvas, (rows, columns, 3) of 0 to 255."""
    canvas = figure.find_element('tag name', 'canvas')
    script = """const c = arguments[0], p = c.getContext('2d').getImageData(0, 0, c.width, c.height);
                return btoa(Array.from(p.data, v => String.fromCharCode(v)).join(''))"""
    data = np.frombuffer(base64.b64decode(browser.execute_script(script, canvas)), np.uint8)
    return data.reshape(480, 480, 4)[..., :3].astype(int)


def blue(picture):
    return picture[..., 2] > picture[..., 0] + 10


def orange(picture):
    return picture[..., 0] > picture[..., 2] + 10


def test_it_turns_with_the_mouse_and_the_keys_and_hides_what_is_unchecked(page, browser, tmp_path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    figure = page()
    canvas = figure.find_element('tag name', 'canvas')
    front, first = figure.get_attribute('data-shown'), pixels(browser, figure)
    assert first.any() and np.allclose(json.loads(front), [[-1, 0, 0], [0, 0, 1], [0, 1, 0]])

    def changed(then):
        WebDriverWait(browser, 20).until(lambda b: figure.get_attribute('data-shown') != then)
        return figure.get_attribute('data-shown')

    ActionChains(browser).drag_and_drop_by_offset(canvas, 60, 0).perform()
    dragged = changed(front)
    turn = np.array(json.loads(dragged))
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)
    assert turn[0] @ [0, 1, 0] > 0, 'what was in front has moved to the right'
    assert (pixels(browser, figure) != first).any()
    ActionChains(browser).double_click(canvas).perform()
    assert changed(dragged) == front
    np.testing.assert_array_equal(pixels(browser, figure), first)
    canvas.send_keys(Keys.ARROW_DOWN)
    changed(front)
    ActionChains(browser).double_click(canvas).perform()

    assert blue(first).any() and orange(first).any()
    for name, hidden in (('label', blue), ('prediction', orange)):
        browser.find_element('id', f'show-{name}').send_keys(Keys.SPACE)
        assert not hidden(pixels(browser, figure)[60:-60, 60:-60]).any()
    assert not pixels(browser, figure)[60:-60, 60:-60].any()
    log = [entry['message'] for entry in browser.get_log('browser')]
    assert [line for line in log if 'willReadFrequently' not in line and 'readback' not in line] == []  # of `pixels`


def test_right_is_left_and_head_is_up_whatever_the_axes(page, browser):
    """A bar from the patient's left foot to the right shoulder, as two arrays; the marker is at the right shoulder."""
    label = np.zeros((10, 40, 40), bool)
    for n in range(40):
        label[3:7, max(n - 3, 0) : n + 3, max(n - 3, 0) : n + 3] = True
    prediction = np.zeros_like(label)
    prediction[2:8, :6, :6] = True  # HEAD_DOWN: columns run to the left, slices down
    seen = []
    for way in (1, -1):  # as it is, and as a left-handed array whose columns run to the right
        affine = affine_of((1, 1, 1))
        affine[:, 1] *= way
        masks = {'label': label[:, ::way], 'prediction': prediction[:, ::way]}
        figure = page(masks, Geometry(affine, 'position', 'x', 'DICOM'))
        seen.append(pixels(browser, figure)[40:-40, 40:-40])
        assert (np.argwhere(orange(seen[-1])).mean(axis=0) < 150).all(), 'the right shoulder is up and on the left'
    assert (np.abs(seen[0] - seen[1]).max(axis=2) > 10).mean() < 0.01


@pytest.mark.parametrize('mirror', [1, -1])
def test_the_surface_is_closed_and_has_the_volume_of_the_mask(mirror, page, browser):
    mask = ball(9, (24, 23, 22), (11, 12, 10)) | ball(4, (24, 23, 22), (19, 19, 10))
    page()
    axes = np.diag([mirror * 0.8, 0.9, 1.1]).tolist()
    packed = base64.b64encode(np.packbits(mask)).decode()
    script = """const s = surfaceOf(...arguments);
                return [s.volume, Array.from(s.points), Array.from(s.normals), s.quads]"""
    volume, points, normals, quads = browser.execute_script(script, packed, mask.shape, axes)
    assert volume == pytest.approx(mask.sum() * 0.8 * 0.9 * 1.1, rel=0.01)
    edges = Counter((quad[n], quad[(n + 1) % 4]) for quad in np.reshape(quads, (-1, 4)).tolist() for n in range(4))
    assert all(edges[b, a] == count for (a, b), count in edges.items())
    points, normals = np.reshape(points, (-1, 3)), np.reshape(normals, (-1, 3))
    index = points / np.diag(axes) + (np.array(mask.shape) - 1) / 2
    assert (np.abs(index[:, None] - np.argwhere(mask)).max(axis=2).min(axis=1) <= 1 + 1e-3).all(), (
        'within a voxel of the mask'
    )
    away = points - points.mean(axis=0)
    assert ((away * normals).sum(axis=1) > 0).mean() > 0.9, 'normals lead outside'
