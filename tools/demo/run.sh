#!/usr/bin/env bash
# The whole way on real parts, as `make demo` runs it: documents → vLLM teacher → two caches → students → one table.
# Every command is printed before it runs; all of it can be typed by hand. A second run continues where the first stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"
export TOKENIZERS_PARALLELISM=false

OUT=demo
SEEDS="1 2 3"
began=$SECONDS

step() { printf '\n\033[1m%s\033[0m\n' "$1"; }
run() { printf '$ %s\n' "$*"; "$@"; }

step "1. Instruction pairs from the Python standard library, split by module"
run python tools/demo/extract_pairs.py --out "$OUT/pairs"

step "2. The teacher's log-probabilities, by vLLM: once for training, once for evaluation"
for split in train heldout; do
  run logitcache build --teacher tools/demo/teacher --data "$OUT/pairs/$split.jsonl" --out "$OUT/cache-$split" \
    --top-k 64 --keep id
done
