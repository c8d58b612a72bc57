#!/usr/bin/env bash
# All checks of the project, in the order in which a failure is cheapest to find.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TQDM_DISABLE=1 MPLBACKEND=agg HF_HUB_OFFLINE=1

echo "== notebooks and library are in step"
before=$(sha256sum nbs/*.ipynb mmfer/*.py)
nbdev_clean
nbdev_export
diff <(echo "$before") <(sha256sum nbs/*.ipynb mmfer/*.py) || {
  echo "nbdev_clean or nbdev_export changed the files above: commit what they wrote" >&2; exit 1; }

echo "== README.md is in step with nbs/index.ipynb"
python tests/readme.py

echo "== every chapter runs"
nbdev_test --n_workers 2 --timing

echo "== tests"
python -m pytest -q --durations=10 tests
