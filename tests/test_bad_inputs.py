"""The corpus of bad inputs: how each is broken, and the one line that it ends with. Nothing here shows a traceback.

Each table reads: what is wrong -> (how to make it, what the line says). The files are made here, none is stored.
"""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from conftest import FOLDER, fusion_args, pretrain_args, run_script, tiny_weights, training_args, write_case
from raw_scans import BOMB, DICOM2NPY, NII2NPY, converted, make_slices, random_volume, write_nifti, write_slices
from test_run_sh import run_sh

from running.files import save_volume


def refused(done, line, code=1):
    """The script ended with this code, and an error of one line that says this."""
    assert done.code == code, done.out + done.err
    errors = [text for text in done.err.splitlines() if 'error: ' in text]
    assert len(errors) == 1 and line in errors[0], done.out + done.err
    assert 'Traceback' not in done.out + done.err
    return True


# --- .npy: python init.py DATA_PATH 1 1 -100 240 -------------------------------------------------------------------


def npy_bytes(header, data=bytes(120), version=b'\1\0'):
    length = struct.pack('<H' if version == b'\1\0' else '<I', len(header))
    return b'\x93NUMPY' + version + length + header.encode() + data


def claiming(shape, kind="'<i2'"):
    return npy_bytes(f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}\n")


def saved(array, save=np.save):
    file = io.BytesIO()
    save(file, array)
    return file.getvalue()


ARRAYS = {
    'an empty file': (b'', 'not a readable .npy array'),
    'text': (b'text', 'not a readable .npy array'),
    'a header alone': (saved(np.zeros((3, 4, 5)))[:128], 'more than the file holds: it is truncated'),
    'the last voxel cut off': (saved(np.zeros((3, 4, 5)))[:-1], 'more than the file holds: it is truncated'),
    'a shape that no scan has': (claiming('(100000, 100000, 100000)'), 'which no scan has'),
    'a shape whose product overflows': (claiming('(4294967296, 4294967296, 4)'), 'which no scan has'),
    'more than it holds': (claiming('(1024, 1024, 1024)'), 'more than the file holds'),
    'a negative shape': (claiming('(-1, 4, 5)'), 'which no scan has'),
    'no shape': (npy_bytes("{'descr': '<i2'}\n"), 'its header cannot be read'),
    'a header that is no Python': (npy_bytes('{' * 500 + '\n'), 'its header cannot be read'),
    'a header nested without end': (npy_bytes('-' * 9000 + '1\n'), 'its header cannot be read'),
    'a header that calls': (npy_bytes("__import__('os').abort()\n"), 'its header cannot be read'),
    'a header of 4 GB': (b'\x93NUMPY\2\0' + b'\xff' * 4 + b' ' * 200, 'its header cannot be read'),
    'a version to come': (npy_bytes('{}', version=b'\7\0'), 'its .npy version (7, 0) is not'),
    'objects': (saved(np.array([{}])), 'it holds object, not numbers'),
    'a pickle of objects': (claiming('(1,)', "'|O'"), 'it holds object, not numbers'),
    'words': (saved(np.full((3, 4, 5), 'organ')), 'it holds <U5, not numbers'),
    'words of 10^9 letters': (claiming('(3, 4, 5)', "'<U1000000000'"), 'its header cannot be read'),
    'complex numbers': (saved(np.zeros((3, 4, 5), complex)), 'it holds complex128, not numbers'),
    'records': (saved(np.zeros((3, 4, 5), 'i2,i2')), 'not numbers'),
    'an archive': (saved(np.zeros((3, 4, 5)), np.savez), 'not a readable .npy array'),
    'a flat array': (saved(np.zeros((3, 4))), 'are not two volumes (W, H, L) of one shape'),
    'an array without voxels': (claiming('(0, 1000000000000, 5)'), 'are not two volumes (W, H, L) of one shape'),
    'values that are no numbers': (saved(np.full((3, 4, 5), np.nan)), 'not all values are finite'),
}


@pytest.mark.parametrize('what', ARRAYS)
def test_a_bad_array(what, call, tmp_path, spare):
    content, line = ARRAYS[what]
    write_case(tmp_path, 'a', np.zeros((3, 4, 5), np.int16), np.zeros((3, 4, 5), np.uint8))
    (tmp_path / 'images/a.npy').write_bytes(content)
    assert refused(call('init.py', tmp_path, 1, 1, -100, 240), line)
    assert not (tmp_path / 'lists').exists()


def test_a_sparse_array_of_a_terabyte(call, tmp_path, spare):
    write_case(tmp_path, 'a', np.zeros((3, 4, 5), np.int16), np.zeros((3, 4, 5), np.uint8))
    (tmp_path / 'images/a.npy').write_bytes(claiming('(100000, 100000, 50)'))
    os.truncate(tmp_path / 'images/a.npy', 10**12)
    assert refused(call('init.py', tmp_path, 1, 1, -100, 240), 'which no scan has')


@pytest.mark.parametrize('kind', ['a pipe', 'a device', 'a folder'])
def test_what_is_no_file_is_not_waited_for(kind, call, tmp_path):
    write_case(tmp_path, 'a', np.zeros((3, 4, 5), np.int16), np.zeros((3, 4, 5), np.uint8))
    path = tmp_path / 'images/a.npy'
    path.unlink()
    {'a pipe': os.mkfifo, 'a device': lambda path: path.symlink_to('/dev/zero'), 'a folder': os.mkdir}[kind](path)
    assert refused(call('init.py', tmp_path, 1, 1, -100, 240), 'it is not a regular file')


# --- .npz: python coarse_fusion.py ... (a volume cannot be made again there) ----------------------------------------


def archive(content, name='volume.npy', method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', method) as made:
        made.writestr(name, content)
    return file.getvalue()


def longer(content):
    """An array, and zeros without end after it."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as made,
        made.open('volume.npy', 'w') as entry,
    ):
        entry.write(content)
        for _ in range(BOMB >> 20):
            entry.write(bytes(1 << 20))
    return file.getvalue()


GOOD = np.zeros((14, 16, 7), np.uint8)
VOLUMES = {
    'an empty file': (lambda: b'', 'File is not a zip file'),
    'text': (lambda: b'text', 'File is not a zip file'),
    'cut off': (lambda: archive(saved(GOOD))[:-40], 'File is not a zip file'),
    'a byte flipped': (lambda: archive(saved(GOOD + 1), method=zipfile.ZIP_STORED).replace(b'\1\1\1', b'\1\2\1', 1), 'Bad CRC-32'),
    'another name': (lambda: archive(saved(GOOD), 'prediction.npy'), "There is no item named 'volume.npy'"),
    'another shape': (lambda: archive(saved(GOOD[1:])), 'shape (13, 16, 7) instead of (14, 16, 7)'),
    'objects': (lambda: archive(saved(np.array([{}]))), 'it holds object, not numbers'),
    'a pickle instead': (lambda: archive(pickle.dumps(GOOD)), 'the magic string is not correct'),
    'a shape that no scan has': (lambda: archive(claiming('(100000, 100000, 100000)')), 'which no scan has'),
    'more claimed than packed': (lambda: archive(claiming('(14, 16, 7)', "'<f8'")), 'it unpacks to'),
    'more packed than claimed': (lambda: longer(saved(GOOD)), f'it unpacks to {BOMB + len(saved(GOOD))} bytes'),
    'packed by LZMA': (lambda: archive(saved(GOOD), method=zipfile.ZIP_LZMA), 'compressed in a way that numpy does not use'),
    'an LZMA dictionary of 4 GB': (
        lambda: archive(saved(GOOD), method=zipfile.ZIP_LZMA).replace(
            struct.pack('<I', 8 << 20), struct.pack('<I', 2**32 - 1), 1
        ), 'compressed in a way that numpy does not use',
    ),
}  # fmt: skip


@pytest.fixture
def to_fuse(data):
    """The tiny data with volumes of coarse testing, all empty; -> {plane: the first one's file}."""
    folders = [
        data / f'results/coarse_testing_{FOLDER.removeprefix("SIJ_training_")}/FD0:{plane}J3_1.pkl' for plane in 'XYZ'
    ]
    for folder in folders:
        save_volume(folder / 'volumes/e1111_1.npz', GOOD)
        save_volume(folder / 'volumes/e1111_2.npz', np.zeros((16, 14, 6), np.uint8))
    return folders[1] / 'volumes/e1111_1.npz'


@pytest.mark.parametrize('what', VOLUMES)
def test_a_bad_volume(what, to_fuse, data, call, spare):
    make, line = VOLUMES[what]
    to_fuse.write_bytes(make())
    done = call('coarse_fusion.py', *fusion_args(data))
    assert refused(done, f'{to_fuse}: no such volume, or not a whole one; test this plane and fold first')
    said = [text for text in done.out.splitlines() if text.startswith(f'{to_fuse}: not a whole .npz')]
    assert len(said) == 1 and line in said[0] and said[0].endswith('; it will be made again if possible'), done.out


def test_good_volumes_are_fused(to_fuse, data, call):
    assert call('coarse_fusion.py', *fusion_args(data)).code == 0


# --- lists: python coarse_fusion.py, training.py -------------------------------------------------------------------

CASES = {
    'one field': (b'0\n', "'0' is not `case image_file label_file`"),
    'four fields': (b'0 a b c\n', 'is not `case image_file label_file`'),
    'a case in words': (b'first images/0001.npy labels/0001.npy\n', 'is not `case image_file label_file`'),
    'a case above which no number is': (
        '² images/0001.npy labels/0001.npy\n'.encode(),
        'is not `case image_file label_file`',
    ),
    'a case of 5000 digits': (b'9' * 5000 + b' a b\n', '... (5004 characters) is not `case'),
    'a line without end': (b'0 ' + b'a' * 70000 + b' b\n', 'line 1 is not text, or longer than a list line can be'),
    'zero bytes': (b'0 images/0001.npy\0 labels/0001.npy\n', 'line 1 is not text'),
    'other bytes than UTF-8': (b'0 images/\xff.npy labels/\xff.npy\n', "codec can't decode byte 0xff"),
    'a picture': (b'\x89PNG\r\n\x1a\n' + bytes(range(256)), 'not a list'),
    'a case twice': (b'0 images/0001.npy labels/0001.npy\n' * 2, 'holds case 0 twice'),
    'a missing label': (
        b'0 images/0001.npy labels/none.npy\n1 images/0002.npy labels/0002.npy\n',
        'labels/none.npy: no such file',
    ),
    'a label that is a device': (
        b'0 images/0001.npy /dev/zero\n1 images/0002.npy labels/0002.npy\n',
        '/dev/zero: not a readable .npy array (it is not a regular',
    ),
}


@pytest.mark.parametrize('what', CASES)
def test_a_bad_list_of_cases(what, to_fuse, data, call):
    content, line = CASES[what]
    (data / 'lists/testing_FD0.txt').write_bytes(content)
    assert refused(call('coarse_fusion.py', *fusion_args(data)), line)


def test_a_sparse_list_of_a_terabyte(to_fuse, data, call, spare):
    os.truncate(data / 'lists/testing_FD0.txt', 10**12)
    assert refused(call('coarse_fusion.py', *fusion_args(data)), 'is not text, or longer than a list line can be')


SLICES = {
    'no line': (b'', 'holds no slice; run init.py again'),
    'an empty line': (b'\n', 'holds no slice; run init.py again'),
    'a number too few': (b'2 0 images_Z/a.npy labels_Z/a.npy 0.5 1 0 1 0\n', 'is not a slice of a list'),
    'a number in words': (b'2 0 images_Z/a.npy labels_Z/a.npy 0.5 1 0 1 0 one\n', 'is not a slice of a list'),
    'a negative count': (b'2 0 images_Z/a.npy labels_Z/a.npy 0.5 -1 0 1 0 1\n', 'is not a slice of a list'),
    'an average that is no number': (b'2 0 images_Z/a.npy labels_Z/a.npy nan 1 0 1 0 1\n', 'is not a slice of a list'),
    'a count of 5000 digits': (b'2 0 a b 0.5 ' + b'9' * 5000 + b' 0 1 0 1\n', 'is not a slice of a list'),
    'a slice of another case folder': (
        b''.join(b'%d 0 images_Z/none.npy labels_Z/none.npy 0.5 9 0 1 0 1\n' % case for case in range(4)),
        'case 2 is images_Z, but images/0003.npy in the list of the fold',
    ),
    'a slice too few': (
        b''.join(b'0 %d images_Z/a.npy labels_Z/a.npy 0.5 9 0 1 0 1\n' % j for j in (0, 2)),
        'slice 2 of case 0 is out of place',
    ),
    'a case too few': (
        b'0 0 images_Z/a.npy labels_Z/a.npy 0.5 9 0 1 0 1\n',
        'ends with slice 0 of case 0, but there are more',
    ),
    'fewer organs': (b'0 0 images_Z/a.npy labels_Z/a.npy 0.5 9 0 1 0 1\n', 'holds no organ 2; run init.py'),
}


@pytest.mark.parametrize('what', SLICES)
def test_a_bad_list_of_slices(what, data, call):
    content, line = SLICES[what]
    (data / 'lists/training_Z.txt').write_bytes(content)
    args = training_args(data)
    if what == 'fewer organs':
        args[2] = args[7] = 2
    weights = {k.removeprefix('fine_model.'): v for k, v in tiny_weights().items() if k.startswith('fine_model.')}
    torch.save(weights, data / 'own.pth')
    assert refused(call('training.py', *args, '--pretrained', data / 'own.pth'), line)


@pytest.mark.parametrize('kind', ['images', 'labels'])
def test_slices_of_unlike_shape(kind, data, call):
    for file in (data / f'{kind}_Z/0003').iterdir():
        np.save(file, np.zeros((3, 3), np.int16))
    weights = {k.removeprefix('fine_model.'): v for k, v in tiny_weights().items() if k.startswith('fine_model.')}
    torch.save(weights, data / 'own.pth')
    args = [*training_args(data), '--pretrained', data / 'own.pth', '--seed', 1]
    assert refused(call('training.py', *args), 'labels_Z/0003/')


# --- snapshots: python coarse_testing.py, training.py ---------------------------------------------------------------


class Calls:
    """Its pickle calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def snapshot(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def legacy(value):
    return snapshot(value, _use_new_zipfile_serialization=False)


def packed(content):
    """The archive with its entries packed, and one of them a bomb."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, bytes(BOMB) if entry.filename.endswith('data/0') else old.read(entry))
    return file.getvalue()


def claims_more(content, numbers):
    """Legacy weights whose one tensor of four numbers claims to have this many."""
    assert content.count(b'K\4N') == 1
    return content.replace(b'K\4N', b'\x8a\6' + struct.pack('<Q', numbers)[:6] + b'N')


SNAPSHOTS = {
    'an empty file': (lambda: b'', 'not a readable snapshot'),
    'text': (lambda: b'hello\n', 'not a readable snapshot'),
    'cut off': (lambda: snapshot(tiny_weights())[:5000], 'not a readable snapshot'),
    'cut off, legacy': (lambda: legacy(tiny_weights())[:9000], 'FD0:ZJ3_1.pkl: '),
    'a call': (lambda: snapshot({'w': Calls(os.system, 'false')}), 'refused: it is damaged or not plain weights'),
    'a call, legacy': (lambda: legacy({'w': Calls(os.system, 'false')}), 'it calls posix.system'),
    'a plain pickle': (lambda: pickle.dumps(Calls(os.system, 'false')), 'refused: it is damaged or not plain weights'),
    'a byte array of 2^40': (lambda: snapshot({'w': Calls(bytearray, 3)}).replace(b'K\3\x85', b'K\3\x85'), 'bytearray'),
    'a call in legacy weights before an archive': (
        lambda: legacy({'w': Calls(os.system, 'false')}) + snapshot(tiny_weights()), 'it calls posix.system',
    ),
    'packed entries': (lambda: packed(snapshot(tiny_weights())), 'its entries ask for more bytes than the file holds'),
    'one number spread over 2^31': (
        lambda: snapshot({'w': torch.zeros(1).expand(2**31)}), 'its header asks for 2147483648 elements, but the file has',
    ),
    'few numbers spread over many tensors': (
        lambda: snapshot({f'w{i}': t for i, t in enumerate([torch.zeros(1000)] * 99)}), 'its tensors ask for more numbers than',
    ),
    '2^40 numbers, legacy': (lambda: claims_more(legacy({'w': torch.zeros(4)}), 2**40), 'its header asks for 1099511627776 elements'),
    'a list': (lambda: snapshot([torch.zeros(3)]), 'not a state dict of tensors'),
    'a number': (lambda: snapshot({'coarse_model.conv1_1.weight': 3}), 'not a state dict of tensors'),
    'tensors without axes': (
        lambda: snapshot(tiny_weights() | {'coarse_model.conv1_1.weight': torch.tensor(1.0)}), 'not a state dict of tensors',
    ),
    'another network': (lambda: snapshot({'conv1.weight': torch.zeros(3)}), 'not an RSTN snapshot'),
    'a layer missing': (
        lambda: snapshot({k: v for k, v in tiny_weights().items() if 'fc7.bias' not in k}), 'coarse_model.fc7.bias is missing',
    ),
    'a layer of another shape': (
        lambda: snapshot(tiny_weights() | {'coarse_model.fc7.bias': torch.zeros(3)}), 'coarse_model.fc7.bias is (3,), expected',
    ),
    'weights that diverged': (
        lambda: snapshot(tiny_weights() | {'coarse_model.fc7.bias': torch.full((256,), torch.nan)}), 'is not finite',
    ),
}  # fmt: skip


@pytest.mark.parametrize('what', SNAPSHOTS)
def test_a_bad_snapshot(what, data, call, spare):
    make, line = SNAPSHOTS[what]
    path = data / 'models/snapshots' / FOLDER / 'FD0:ZJ3_1.pkl'
    path.parent.mkdir(parents=True)
    path.write_bytes(make())
    assert refused(call('coarse_testing.py', *training_args(data)), line)
    assert not list(data.rglob('*.npz'))


STARTS = {
    'a layer of another shape': (lambda w: w | {'fc6.weight': torch.zeros(3)}, 'fc6.weight is (3,), expected'),
    'a width that no memory holds': (lambda w: w | {'conv1_1.weight': torch.zeros(10**6, 1, 1, 1)}, 'conv1_1.weight is (1000000,'),
    'a layer missing': (lambda w: {k: v for k, v in w.items() if k != 'fc7.bias'}, 'fc7.bias is missing'),
    'no first layer': (lambda w: {'fc7.bias': w['fc7.bias']}, 'not an FCN-8s: conv1_1.weight is missing'),
}  # fmt: skip


@pytest.mark.parametrize('what', STARTS)
def test_a_bad_start(what, data, call):
    spoil, line = STARTS[what]
    weights = {k.removeprefix('fine_model.'): v for k, v in tiny_weights().items() if k.startswith('fine_model.')}
    torch.save(spoil(weights), data / 'own.pth')
    assert refused(call('training.py', *training_args(data), '--pretrained', data / 'own.pth'), line)


@pytest.mark.parametrize(
    ('content', 'facts'),
    [
        ('words', {}),
        ({'organ_ID': 1, 'plane': 5, 'more': 3}, {'organ_ID': 1}),
        ({'cases': [[]], 'intensity_window': [1], 'spacing': ['a', 'b', 'c']}, {}),
        ({'cases': 5, 'recipe': 'published'}, {'recipe': 'published'}),
    ],
)
def test_of_what_weights_say_only_facts_of_the_right_type_count(content, facts, data):
    from running.weights import description, load_weights

    state = torch.nn.Linear(2, 2).state_dict()
    state._metadata['OrganSegRSTN'] = content
    torch.save(state, data / 'a.pth')
    assert description(load_weights(data / 'a.pth')) == facts


# --- figures to compare with: python report.py DATA_PATH --reference FILE -------------------------------------------

REFERENCES = {
    'an empty file': '',
    'no JSON': '{"name": ',
    'a list': '[]',
    'nested without end': '{"a":' * 50000,
    'a number of 5000 digits': '{"coarse2fine": {"mean": ' + '9' * 5000 + '}}',
    'runs that are none': '{"runs": 5}',
    'an organ that is a list': '{"runs": [{"organ": [], "results": {}}]}',
    'a mean in words': '{"coarse2fine": {"mean": "high"}}',
    'a mean of 84 %': '{"coarse2fine": {"mean": 84.62}}',
    'a mean that is no number': '{"coarse2fine": {"mean": NaN}}',
    'no figures': '{"name": "nobody"}',
}


@pytest.mark.parametrize('what', REFERENCES)
def test_a_bad_reference(what, call, tmp_path):
    (tmp_path / 'reference.json').write_text(REFERENCES[what])
    assert refused(call('report.py', tmp_path, '--reference', tmp_path / 'reference.json'), 'reference.json: ')


# --- arguments: usage, one line, exit code 2 ------------------------------------------------------------------------

ARGUMENTS = {
    'no arguments': ('init.py', [], 'the following arguments are required: data_path'),
    'too few': ('init.py', ['d', 1, 1, -100], 'required: high_range'),
    'a fold in words': ('training.py', {1: 'first'}, "argument current_fold: invalid whole number value: 'first'"),
    'organ 256': ('training.py', {2: 256}, '256 is not a whole number of 1 to 255'),
    'a window upside down': ('init.py', ['d', 1, 1, 240, -100], '-100 is not above low_range, 240'),
    'a window without end': ('init.py', ['d', 1, 1, -100, 'inf'], 'argument high_range'),
    'a plane W': ('training.py', {8: 'W'}, "'W' is not one of X, Y, Z"),
    'a rate that is a path': ('training.py', {10: '1e-5/..'}, 'argument learning_rate1'),
    'a rate of two lines': ('training.py', {10: '1e-5\n'}, 'argument learning_rate1'),
    'a timestamp that is a path': ('training.py', {-1: '../../../../tmp'}, "cannot be part of a file's name"),
    'a timestamp of two lines': ('training.py', {-1: '20261123\n000000'}, "cannot be part of a file's name"),
    'a seed beyond 2^63': ('training.py', ['--seed', 2**64], 'argument --seed'),
    'an unknown option': ('training.py', ['--sed', '1', '--color'], 'unrecognized arguments: --sed 1 --color'),
    'an orientation': (NII2NPY, ['--orientation', 'guess'], "argument --orientation: invalid choice: 'guess'"),
    'two lines in an unknown option': ('predict.py', ['a', 'b', 'x', 'y', 'z', '--a\nb'], 'unrecognized arguments: --a b'),
}  # fmt: skip


@pytest.mark.parametrize('what', ARGUMENTS)
def test_a_bad_argument(what, call):
    script, changed, line = ARGUMENTS[what]
    args = changed
    if script == 'training.py':
        args = training_args('d')
        if isinstance(changed, dict):
            for place, value in changed.items():
                args[place] = value
        else:
            args += changed
    done = call(script, *args)
    assert refused(done, line, code=2)
    assert done.err.startswith('usage: ') and done.err.splitlines()[-1].count('error: ') == 1


def test_a_width_that_no_memory_holds(data, call, spare):
    assert refused(call('pretrain.py', *pretrain_args(data), '--width', 10**6), "can't allocate memory")


def test_a_name_that_looks_like_an_option_is_told_how_to_give(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_case(tmp_path / '-data', 'a', np.zeros((3, 4, 5), np.int16), np.ones((3, 4, 5), np.uint8))
    refused(call('init.py', '-data', 1, 1, -100, 240), 'write a name that begins with - as ./-data', code=2)
    assert call('init.py', './-data', 1, 1, -100, 240).code == 0


# --- names ---------------------------------------------------------------------------------------------------------

FINE = [
    "o'brien",
    'a"b',
    '$(false)',
    '`false`',
    '-rf',
    'a;b',
    'a:b',
    'a,b',
    'a\\b',
    '[a]',
    '*',
    'Bauchspeicheldrüse',
    '膵臓',
    '&<b>',
]
UNFIT = {
    'with space': 'white space', 'a\nb': 'white space', 'a\tb': 'white space', 'a\u2028b': 'white space',
    'a\x1b[2Jb': 'characters that cannot be printed', 'a\u202eb': 'characters that cannot be printed',
    os.fsdecode(b'a\xff'): 'characters that cannot be printed',
}  # fmt: skip


def test_cases_of_any_printable_name_go_through(call, tmp_path, monkeypatch):
    """From NIfTI to the lists, and a volume of each is fused: names are data, never shell, pattern or option."""
    data = tmp_path / "my [data] $(touch x) 'q' \n ü"
    volume = random_volume(shape=(4, 5, 6))
    for name in FINE:
        write_nifti(tmp_path / f'raw/images/{name}.nii', volume)
        write_nifti(tmp_path / f'raw/labels/{name}.nii', (volume > 0).astype(np.uint8))
    monkeypatch.chdir(tmp_path)
    done = call(NII2NPY, 'raw', data)
    assert done.code == 0, done.out
    done = call('init.py', data, 1, 1, -100, 240)
    assert done.code == 0, done.err
    names = [line.split()[1] for line in (data / 'lists/testing_FD0.txt').read_text(encoding='utf-8').splitlines()]
    assert names == [f'images/{name}.npy' for name in sorted(FINE)]
    for plane in 'XYZ':
        for number in range(1, len(FINE) + 1):
            shape = (5, 4, 6)
            folder = data / f'results/coarse_testing_1e-5x10,4/FD0:{plane}J3_1.pkl/volumes'
            save_volume(folder / f'e1111_{number}.npz', np.zeros(shape, np.uint8))
    assert call('coarse_fusion.py', *fusion_args(data), '--nifti').code == 0
    assert call('report.py', data, '--slices', 1).code == 0
    assert call('check_data.py', data, 1, -100, 240).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([data.name, 'raw'])


def test_predict_takes_any_path(call, tmp_path):
    folder = tmp_path / "-my [scans], $(touch x) 'q' \n ü"
    folder.mkdir()
    for plane in 'XYZ':
        torch.save(tiny_weights(), folder / f'FD0:{plane}J3_1.pkl')
    write_nifti(folder / '-in;.nii', random_volume())
    snapshots = [folder / f'FD0:{plane}J3_1.pkl' for plane in 'XYZ']
    done = call('predict.py', folder / '-in;.nii', folder / '*.nii.gz', *snapshots, '--rounds', 0, '--GPU_ID', 'cpu')
    assert done.code == 0, done.err
    assert (folder / '*.nii.gz').exists() and not (tmp_path / 'x').exists()


def test_run_sh_takes_any_path(tmp_path):
    data = tmp_path / "-my [data] $(touch ran) `touch ran` 'q' \" \n ü"
    write_case(data, 'a', np.zeros((3, 4, 5), np.int16), np.ones((3, 4, 5), np.uint8))
    (tmp_path / '-raw').mkdir()
    dry = run_sh(tmp_path, DRY_RUN=1, LAZY_MODE=1, DATA_PATH=data.name)
    assert dry.returncode == 0 and 'DEMO' not in dry.stdout, 'its images are seen'
    named = run_sh(tmp_path, DRY_RUN=1, ENABLE_DICOM2NPY=1, RAW_PATH='-raw', DATA_PATH=data.name)
    assert f' {tmp_path}/-raw ' in named.stdout, 'a name, not an option'
    done = run_sh(tmp_path, ENABLE_INITIALIZATION=1, ENABLE_CHECK_DATA=0, DATA_PATH=data.name, FOLDS=1)
    assert done.returncode == 0, done.stderr
    assert (data / 'lists/training_FD0.txt').exists()
    folds = run_sh(tmp_path, DRY_RUN=1, ENABLE_TRAINING=1, CURRENT_FOLD='A', FOLDS='a[$(touch ran)]')
    assert folds.returncode == 2 and 'not a whole number' in folds.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(['-raw', data.name])


@pytest.mark.parametrize('name', UNFIT, ids=ascii)
def test_a_case_of_an_unfit_name_is_refused_by_it(name, call, tmp_path):
    write_case(tmp_path / 'data', name, np.zeros((3, 4, 5), np.int16), np.ones((3, 4, 5), np.uint8))
    assert refused(call('init.py', tmp_path / 'data', 1, 1, -100, 240), f'a case name cannot hold {UNFIT[name]}')
    if UNFIT[name] != 'white space':  # which dicom2npy.py replaces by _
        write_slices(tmp_path / 'raw' / name, make_slices(random_volume()))
        assert f'the case name {name!r} holds {UNFIT[name]}' in converted(call, tmp_path)


# --- as a user runs them --------------------------------------------------------------------------------------------


def test_as_processes_of_their_own(data, tmp_path):
    """A traceback, a hang or a killed process would show here: one of each kind, by the real scripts."""
    (data / 'images/0001.npy').write_bytes(claiming('(1024, 1024, 1024)'))
    assert refused(run_script('init.py', data, 1, 2, -100, 240), 'more than the file holds')
    (data / 'lists/testing_FD0.txt').write_bytes(b'\0')
    assert refused(run_script('coarse_fusion.py', *fusion_args(data)), 'line 1 is not text')
    write_slices(tmp_path / 'raw/a\x1b', make_slices(random_volume()))
    done = run_script(DICOM2NPY, tmp_path / 'raw', tmp_path / 'out')
    assert (
        done.code == 1
        and 'characters that cannot be printed' in done.err
        and '\x1b' not in done.err.replace('a\x1b:', '')
    )
    assert run_script('training.py', *training_args(data), '--seed', -1).code == 2


def test_a_terminal_that_cannot_show_a_name_stops_nothing(tmp_path):
    write_nifti(tmp_path / 'raw/images/膵臓.nii', random_volume())
    environment = os.environ | {'PYTHONIOENCODING': 'ascii'}
    done = run_script(NII2NPY, tmp_path / 'raw', tmp_path / 'out', env=environment)
    assert done.code == 0 and done.out.startswith('\\u81b5\\u81d3: image 5 x 6 x 4')
    assert [file.name for file in (tmp_path / 'out/images').iterdir()] == ['膵臓.npy']
