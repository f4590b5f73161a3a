"""README.md and docs/: their commands are understood, their links lead somewhere, their tables are complete."""

import os
import re
import runpy
import shlex
import subprocess

import pytest
from conftest import CODE, REPO

PAGES = [REPO / 'README.md', *sorted((REPO / 'docs').glob('*.md'))]
PROSE = [*PAGES, REPO / 'CHANGELOG.md', REPO / 'logs/README.md']
BLOCK = re.compile(r'(?:<!-- needs: ([^\n]+) -->\n)?```bash\n(.*?)```', re.DOTALL)
FENCED = re.compile(r'^ *```.*?^ *```', re.DOTALL | re.MULTILINE)

# run.sh prints its commands, since DRY_RUN is 1, and so do the scripts; nothing is installed or activated
SHELL = r"""
set -euo pipefail
bash() { if [[ $1 == run.sh ]]; then command bash "$REPO/run.sh"; else command bash -n "$REPO/$1"; fi; }
python() { printf '%q ' python "$@"; echo; }
source() { [[ $1 == .venv/bin/activate ]]; }
"""

pages = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
prose = pytest.mark.parametrize('page', PROSE, ids=lambda page: str(page.relative_to(REPO)))


def read(page):
    return page.read_text(encoding='utf-8')


def without_code(page):
    """The text of a page without its code blocks."""
    return FENCED.sub('', read(page))


# --- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def generator():
    """The names in docs/arguments.py."""
    return runpy.run_path(str(REPO / 'docs/arguments.py'))


@pytest.fixture(scope='module')
def parsers(generator):
    """{script name: its own parser}."""
    return {script.name: generator['parser_of'](script) for script in generator['SCRIPTS']}


@pages
def test_commands_are_understood_or_marked_as_needing_what_is_not_there(page, parsers, tmp_path):
    blocks = BLOCK.findall(read(page))
    assert len(blocks) == read(page).count('```bash'), 'a block that is not found'
    for _, commands in blocks:
        subprocess.run(['bash', '-n', '-c', commands], check=True)
    (tmp_path / 'mine/images').mkdir(parents=True)
    (tmp_path / 'mine/labels').mkdir()
    for folder in ('images', 'labels'):
        (tmp_path / 'mine' / folder / 'anna.nii.gz').touch()
    out = run_commands('\n'.join(commands for needed, commands in blocks if not needed), tmp_path)
    for line in out.splitlines():
        if line and not line.startswith('#'):
            words = shlex.split(line)
            place = next(i for i, word in enumerate(words) if word.endswith('.py'))
            parsers[os.path.basename(words[place])].parse_args(words[place + 1 :])


def run_commands(commands, folder):
    """The output of the blocks of a page, run one after another in one shell, as a reader does."""
    environment = {'PATH': os.environ['PATH'], 'REPO': str(REPO), 'DRY_RUN': '1', 'DATA_PATH': str(folder / 'data')}
    shell = ['bash', '-c', SHELL + commands]
    done = subprocess.run(shell, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('name', ['phantom.py', 'predict.py'])
def test_the_scripts_that_draw_the_pictures_import_what_exists(name, generator):
    assert generator['parser_of'](REPO / 'docs' / name)


# --- links and names -----------------------------------------------------------------------------------------------


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)', without_code(page), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@prose
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r'\]\((?!https?:)([^)]+)\)', without_code(page)):
        name, _, anchor = target.partition('#')
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_table_of_files_names_what_is_there_and_every_script():
    table = read(REPO / 'README.md').split('## The files')[1].split('##')[0]
    named = {name for row in re.findall(r'^\| (`.*?) \|', table, re.MULTILINE) for name in re.findall('`(.*?)`', row)}
    assert not [name for name in named if not (REPO / name).exists()]
    scripts = [*CODE.glob('*.py'), *(REPO / 'DATA2NPY').glob('*.py')]
    assert {str(script.relative_to(REPO)) for script in scripts} <= named


def test_the_readme_lists_every_page():
    listed = set(re.findall(r'\(docs/(\w+\.md)\)', read(REPO / 'README.md')))
    assert listed == {page.name for page in PAGES[1:]}


@pages
def test_tests_that_a_page_names_exist(page):
    assert not [name for name in re.findall(r'test_\w+\.py', read(page)) if not (REPO / 'tests' / name).exists()]


def test_the_functions_that_architecture_names_exist():
    found = re.findall(r'`([\w/]+\.(?:py|cc|html))`(?: `([\w.]+)`)?', read(REPO / 'docs/architecture.md'))
    assert len(found) > 40
    for file, name in found:
        path = next((folder / file for folder in (CODE, REPO) if (folder / file).exists()), None)
        assert path, file
        for part in filter(None, name.split('.')):
            defined = rf'^ *(def|class) {part}\b|^{part} = '
            assert re.search(defined, read(path), re.MULTILINE), f'{file} {name}'


# --- size and tables -----------------------------------------------------------------------------------------------


@pages
def test_pages_are_short(page):
    assert page.stat().st_size < 10_000 or page.name == 'arguments.md'  # a table, generated


@prose
def test_lines_of_prose_are_short(page):
    assert not [line for line in without_code(page).splitlines() if len(line) > 100 and line[0] != '|']


def test_generated_pages_are_up_to_date(generator):
    for name, text in generator['pages']().items():
        assert read(REPO / 'docs' / name) == text, f'run: python docs/arguments.py ({name})'


def test_every_setting_of_run_sh_is_explained():
    page = read(REPO / 'docs/flags.md')
    assert not [name for name in re.findall(r'"\$\{(\w+):?=', read(REPO / 'run.sh')) if f'`{name}`' not in page]
    page = re.sub(r'## DEMO SETTINGS.*?(?=\n## )', '', page, flags=re.DOTALL)
    assert not re.findall(r'^.*\|  \|$', page, re.MULTILINE), 'it needs a comment in run.sh'
