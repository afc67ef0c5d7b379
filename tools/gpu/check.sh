#!/usr/bin/env bash
# Runs on one GPU all that waits for one, in at most nine minutes, and writes what it finds to OUT as it comes:
#
#   tools/gpu/check.sh OUT [--device cpu] [--only STEP …] [--times N]
#
# $PYTHON (python3) is a Python that has PyTorch for the GPU, and Triton. Nothing is downloaded: the wheels that pack.sh
# fetched, as far as their parts lie below $WHEELS (build/gpu), are installed into an environment that sees that Python's
# packages. What is not there is named by the steps that need it. tools/gpu/check.py has the steps and says what OUT holds.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
wheels=${WHEELS:-$root/build/gpu}

if compgen -G "$wheels/*/*.whl.1-of-*" >/dev/null; then
  temporary=$(mktemp -d)
  "$python" -m venv --without-pip "$temporary/venv"
  # What this Python sees, it sees after its own; --system-site-packages would not show those of a virtual environment.
  "$python" -c 'import sys; print("\n".join(path for path in sys.path if path.endswith("-packages")))' \
    >"$(echo "$temporary"/venv/lib/python3*/site-packages)/outer.pth"
  for first in "$wheels"/*/*.whl.1-of-*; do
    name=$(basename "${first%.1-of-*}")
    for ((i = 1; i <= ${first##*-of-}; i++)); do
      cat "$wheels"/*/"$name.$i-of-"* >>"$temporary/$name" || { rm "$temporary/$name"; break; }
    done 2>/dev/null
    [ -e "$temporary/$name" ] || echo "check: a piece of $name is missing: left out" >&2
  done
  timeout 45 "$python" -m pip --python "$temporary/venv/bin/python" install --quiet --disable-pip-version-check \
    --no-index --no-deps --no-compile --no-cache-dir "$temporary"/*.whl ||
    echo "check: pip could not install the wheels of $wheels: only what $python has is there" >&2
  python=$temporary/venv/bin/python
else
  echo "check: no wheels below $wheels: only what $python has is there" >&2
fi
exec "$python" "$root/tools/gpu/check.py" "$@"
