#!/usr/bin/env bash
# The whole way on real parts, as `make demo` runs it: documents → teacher → caches → students → one table. vLLM runs the
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

step "2. The teacher's log-probabilities, from vLLM where it is installed: by default, with 64 entries alone, and finer to judge by"
build() { run logitcache build --teacher tools/demo/teacher --data "$OUT/pairs/$1.jsonl" --out "$OUT/cache-$2" --keep id "${@:3}"; }
build train train
build train bucket --top-k 64 --tail-rank 0
build heldout heldout --top-k 256 --tail-rank 128
run logitcache view "$OUT/cache-heldout" --out "$OUT/cache-heldout.html"

step "3. A student that has learnt from hard labels alone: all others begin with it"
[ -e "$OUT/start/model.safetensors" ] || run trainer fit --cache "$OUT/cache-train" --student tools/demo/student --from_scratch true \
  --kd_weight 0 --max_steps 400 --per_device_train_batch_size 8 --learning_rate 3e-3 --lr_scheduler_type cosine --warmup_steps 20 \
  --logging_steps 50 --output_dir "$OUT/start"

step "4. Students from these files, the teacher nowhere in memory: hard labels, then four divergences from both, three seeds each"
run trainer compare tools/recipes/demo.yaml --out "$OUT/compare.png"

cat <<END

caches    $OUT/cache-train, $OUT/cache-bucket, $OUT/cache-heldout (each with a README.md)
page      $OUT/cache-heldout.html (for a browser: what the teacher expected)
students  $OUT/students/RUN-LOSS-SEED (each with a log.txt)
compared  $OUT/compare.png, $OUT/compare.html
took      $((SECONDS / 60)) min $((SECONDS % 60)) s
END
