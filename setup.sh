# Sourced by run.sh and tests/run.sh: leaves in PYTHON the python to use. The user's own, where PYTHON names it; else that
# of .venv, which is made and filled where it is missing or requirements.txt or the C++ module have changed since.
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$HERE/.venv/bin/python
  wanted=$(cat "$HERE/requirements.txt" "$HERE"/SWIG_fast_functions/{*.toml,*.h,*.cc,*.i,setup.py} | cksum)
  if [[ $(cat "$HERE/.venv/ready" 2>/dev/null) != "$wanted" ]]; then
    echo "#### set-up: $HERE/.venv (once; some minutes)"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
      { echo 'python3 3.10 or newer is needed; or name one: PYTHON=... bash run.sh' >&2; exit 1; }
    python3 -m venv "$HERE/.venv" ||
      { echo 'python3 -m venv failed (Debian, Ubuntu: apt-get install python3-venv)' >&2; exit 1; }
    (cd "$HERE" && .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt) ||
      { echo 'installing requirements.txt failed: see above (a C++ compiler and a package index are needed)' >&2; exit 1; }
    echo "$wanted" >"$HERE/.venv/ready"
  fi
elif ! command -v "$PYTHON" >/dev/null; then
  echo "PYTHON is '$PYTHON': there is no such command" >&2
  exit 1
fi
