#!/usr/bin/env bash
# Fetches the wheels of tools/gpu/wheels.txt for a machine that reaches no package index, in parts of at most 60 MB:
#
#   tools/gpu/pack.sh [FOLDER] [PYTHON_VERSION] [PROCESSOR] [GLIBC]      (build/gpu 3.12 x86_64 2.35)
#
# The last three are those of the machine with the GPU: `python3 -V`, `uname -m` and `ldd --version` there. The parts,
# FOLDER/part-1 and so on, are in order of worth: check.sh installs as many as are carried. A larger wheel is in pieces.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-$root/build/gpu} version=${2:-3.12} processor=${3:-x86_64} glibc=${4:-2.35}
limit=60000000
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

platforms=(--platform "manylinux2014_$processor" --platform "manylinux1_$processor")
for ((i = ${glibc#2.}; i >= 5; i--)); do platforms+=(--platform "manylinux_2_${i}_$processor"); done # pip takes none but these
[ ! -e "$folder" ] || { echo "pack: $folder is there already; remove it first" >&2; exit 2; }
part=1 size=0
while read -r requirement; do
  "${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --implementation cp \
    --python-version "$version" "${platforms[@]}" --dest "$temporary/new" "$requirement" ||
    { echo "pack: $requirement is left out" >&2; continue; }
  for wheel in "$temporary"/new/*; do
    split --bytes "$limit" --numeric-suffixes=1 --suffix-length 1 "$wheel" "$wheel."
    rm "$wheel"
    pieces=("$wheel".*)
    for piece in "${pieces[@]}"; do
      size=$((size + $(stat --format %s "$piece")))
      if [ "$size" -gt "$limit" ]; then part=$((part + 1)) size=$(stat --format %s "$piece"); fi
      mkdir -p "$folder/part-$part"
      mv "$piece" "$folder/part-$part/$(basename "$piece")-of-${#pieces[@]}"
    done
  done
done < <(sed 's/ *#.*//; /^$/d' "$root/tools/gpu/wheels.txt")
du -sh --apparent-size "$folder"/*
