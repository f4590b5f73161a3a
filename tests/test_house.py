"""The layers of the code: what a module may import (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

CODE = Path(__file__).resolve().parent.parent / 'OrganSegRSTN'
LAYERS = [
    ['utils'],
    ['running'],
    ['ring', 'scans'],
    ['model', 'Data'],
    ['volumes'],
    ['reporting'],
]
STAGES = {
    'init', 'pretrain', 'training', 'training_parallel', 'coarse_testing', 'coarse_fusion', 'oracle_testing',
    'oracle_fusion', 'coarse2fine_testing', 'predict', 'report', 'check_data', 'merge_organs', '__init__',
}  # fmt: skip
LAYER = {package: layer for layer, packages in enumerate(LAYERS) for package in packages} | dict.fromkeys(
    STAGES, len(LAYERS)
)
MODULES = sorted(path for folder in (CODE, CODE.parent / 'DATA2NPY') for path in folder.rglob('*.py'))


def package(path):
    """The package of a module: its folder, or itself where it stands in OrganSegRSTN/."""
    if CODE not in path.parents:
        return 'init'  # DATA2NPY/ is in the layer of the stages
    return path.relative_to(CODE).parts[0].removesuffix('.py')


def imported(path):
    """The packages that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split('.')[0] for name in names} & LAYER.keys()


def test_every_module_has_its_layer():
    assert {package(path) for path in MODULES} == LAYER.keys()


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(CODE.parent)))
def test_a_module_imports_from_its_own_package_and_the_layers_below(path):
    allowed = {name for name, layer in LAYER.items() if layer < LAYER[package(path)]}
    if package(path) not in STAGES:
        allowed.add(package(path))
    if path.stem == 'training_parallel':
        allowed.add('training')
    assert imported(path) <= allowed


def test_only_the_entry_points_of_DATA2NPY_and_of_the_package_edit_the_search_path():
    edited = {str(path.relative_to(CODE.parent)) for path in MODULES if 'sys.path' in path.read_text()}
    assert edited == {f'DATA2NPY/{name}.py' for name in ('dicom2npy', 'nii2npy', 'make_phantom')} | {
        'OrganSegRSTN/__init__.py'
    }
