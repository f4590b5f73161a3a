# Sourced by run.sh and tests/run.sh: sets PYTHON to the python to use, the user's own if PYTHON
# names one, else that of .venv. Makes .venv, and fills it again when requirements.txt or the C++
# module has changed.
fail() {
  echo "$1" >&2
  exit 1
}
another='name a python that has requirements.txt installed: PYTHON=... bash run.sh'

if [[ -n ${PYTHON:-} ]]; then
  command -v "$PYTHON" >/dev/null || fail "PYTHON is '$PYTHON': there is no such command"
  # the modules of requirements.txt without which a stage fails, whatever its settings
  missing=$("$PYTHON" -c '
import sys
sys.exit("too old") if sys.version_info < (3, 10) else None
import importlib.util
print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))
' torch numpy scipy pydicom nibabel tqdm matplotlib surface_distance jinja2 2>/dev/null) ||
    fail "PYTHON is '$PYTHON', which does not start as python 3.10 or newer"
  [[ -z $missing ]] || fail "$PYTHON lacks $missing; install them: $PYTHON -m pip install -r '$HERE/requirements.txt'"
else
  PYTHON=$HERE/.venv/bin/python
  wanted=$(cat "$HERE/requirements.txt" "$HERE"/SWIG_fast_functions/{*.toml,*.h,*.cc,*.i,setup.py} | cksum)
  if [[ $(cat "$HERE/.venv/ready" 2>/dev/null) != "$wanted" ]]; then
    [[ -w $HERE && ( ! -e $HERE/.venv || -w $HERE/.venv ) ]] ||
      fail "$HERE cannot be written to, so .venv cannot be made there; $another"
    echo "#### set-up: $HERE/.venv (once; some minutes)"
    python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null ||
      fail "python3 is not 3.10 to 3.13, for which requirements.txt has packages; $another"
    python3 -m venv "$HERE/.venv" ||
      fail 'python3 -m venv failed (Debian, Ubuntu: apt-get install python3-venv)'
    (cd "$HERE" && .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt) ||
      fail 'installing requirements.txt failed: see above (a C++ compiler and a package index are needed)'
    echo "$wanted" >"$HERE/.venv/ready"
  fi
fi
