#!/usr/bin/env bash
# The whole way on real parts, as `make demo` runs it: documents → teacher → two caches → students → one table. vLLM runs the
# teacher where it is installed, transformers elsewhere; `logitcache build` says which.
# Every command is printed before it runs and can be typed by hand. A second run continues where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"

OUT=demo

step() { printf '\n%s (%d s)\n' "$1" "$SECONDS"; }
run() {
  printf '$ %s\n' "$*"
  "$@"
}

step "1. Instruction pairs from the Python standard library: signature → docstring, split by module"
run python tools/demo/extract_pairs.py --out "$OUT/pairs"

step "2. The teacher's log-probabilities for both splits, from vLLM where it is installed"
for split in train heldout; do
  run logitcache build --teacher tools/demo/teacher --data "$OUT/pairs/$split.jsonl" --out "$OUT/cache-$split" --keep id
done
run logitcache view "$OUT/cache-heldout" --out "$OUT/cache-heldout.html"

step "3. Students from these files, the teacher nowhere in memory: hard labels only, then four divergences, three seeds each"
run trainer compare tools/recipes/demo.yaml --out "$OUT/compare.png"

cat <<END

caches    $OUT/cache-train, $OUT/cache-heldout (each with a README.md)
page      $OUT/cache-heldout.html (for a browser: what the teacher expected)
students  $OUT/students/RUN-LOSS-SEED (each with a log.txt)
compared  $OUT/compare.png, $OUT/compare.html
took      $((SECONDS / 60)) min $((SECONDS % 60)) s
END
