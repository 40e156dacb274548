#!/usr/bin/env bash
# Builds covey's wheel: of the working tree into dist/, or of a tag into tests/upgrade/wheels/, where it is kept.
# The same sources give the same bytes: the time in the archive is that of the commit.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
tag=${1:-}

if [ -z "$tag" ]; then
    .venv/bin/uv build -q --wheel --no-build-isolation --python .venv/bin/python --out-dir "${OUT:-dist}" .
    ls "${OUT:-dist}"/*.whl
    exit
fi

git rev-parse -q --verify "refs/tags/$tag" >/dev/null || {
    echo "wheel: there is no tag $tag" >&2
    exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git archive "$tag" | tar -x -C "$work"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct "$tag") .venv/bin/uv build -q --wheel --no-build-isolation \
    --python "$root/.venv/bin/python" --out-dir "$root/tests/upgrade/wheels" "$work"
rm -f tests/upgrade/wheels/.gitignore
ls tests/upgrade/wheels/*.whl
