#!/usr/bin/env bash
# All checks of the project, in the order in which a failure is cheapest to find. Nothing in the working tree is
# written: what could rewrite a notebook runs in a copy.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TQDM_DISABLE=1 MPLBACKEND=agg HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
  tar --create --null --files-from - | tar --extract --directory "$copy"

same_as_copy() {  # FILE... : name those that differ from the copy's
  local changed=0 file
  for file in "$@"; do cmp --silent "$file" "$copy/$file" || { echo "  $file" >&2; changed=1; }; done
  return "$changed"
}

echo "== notebooks and library are in step"
(cd "$copy" && nbdev_clean && nbdev_export)
same_as_copy nbs/*.ipynb mmfer/*.py || {
  echo "these files are not what nbdev_clean and nbdev_export write: run .venv/bin/nbdev_clean and" \
       ".venv/bin/nbdev_export, then look at git diff" >&2; exit 1; }

echo "== README.md is in step with nbs/index.ipynb"
python tests/readme.py

echo "== every chapter runs, and leaves no file behind"
before=$(ls -A "$copy/nbs")
(cd "$copy" && nbdev_test --n_workers 2 --timing)
diff <(echo "$before") <(ls -A "$copy/nbs") || { echo "a chapter leaves these files in nbs/" >&2; exit 1; }

echo "== the site builds"
(cd "$copy" && mkdocs build --quiet --strict)

echo "== tests"
python -m pytest -q -n 2 --durations=10 tests

export PYTHONPATH=$PWD/.venv/transformers-lowest
echo "== tests of what rests on transformers, with the lowest version that is supported:" \
     "$(python -c "import transformers; print(transformers.__version__)")"
python -m pytest -q -n 2 tests/test_{weights,audio,visual,fusion,model}.py
