#!/usr/bin/env bash
# Run tests/test_hf_modeling.py under several versions of transformers; offline once they are installed.
#   PYTHON=path/to/python tests/hf_matrix.sh [VERSION ...]
# Each version gets a throw-away virtual environment on top of $PYTHON's, which lends torch and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
[ $# -gt 0 ] || set -- 4.51.3 4.57.6 5.0.0 5.24.0
below=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
torch=$("$python" -c 'import torch; print(torch.__version__.split("+")[0])')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()
for version in "$@"; do
    here="$work/$version"
    "$python" -m venv "$here"
    echo "$below" >"$("$here/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
    # Naming torch's version keeps pip from replacing the one below.
    "$here/bin/python" -m pip install -q "transformers==$version" accelerate "torch==$torch"
    echo "== transformers $version"
    HF_HUB_OFFLINE=1 "$here/bin/python" -m pytest -p no:cacheprovider tests/test_hf_modeling.py || failed+=("$version")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed under: ${failed[*]}" >&2; exit 1; }
