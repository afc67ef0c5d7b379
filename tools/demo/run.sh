#!/usr/bin/env bash
# The whole way on real parts, as `make demo` runs it: documents → vLLM teacher → two caches → students → one table.
# Every command is printed before it runs and can be typed by hand. A second run continues where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"

OUT=demo
SEEDS="1 2 3"
LOSSES="hard fkl rkl akl todi"
STUDENT="--student tools/demo/student --from_scratch true --max_steps 300 --per_device_train_batch_size 8 \
--learning_rate 3e-3 --lr_scheduler_type cosine --warmup_steps 20 --eval_steps 75 --per_device_eval_batch_size 32 --logging_steps 20 --save_strategy no"

step() { printf '\n%s (%d s)\n' "$1" "$SECONDS"; }
run() {
  printf '$ %s\n' "$*"
  "$@"
}

fit() { # loss, seed: one student; its output goes to a file of its own
  local loss=$1 seed=$2 folder="$OUT/students/$1-$2" chosen
  if [ "$folder/eval.json" -nt "$OUT/cache-train/logitcache.json" ] && [ "$folder/eval.json" -nt "$OUT/cache-heldout/logitcache.json" ]; then
    echo "$folder is already there"
    return
  fi
  if [ "$loss" = hard ]; then chosen="--kd_weight 0"; else chosen="--loss $loss --kd_weight 0.9"; fi
  mkdir -p "$folder"
  # shellcheck disable=SC2086  # options are words
  if ! trainer fit --cache $OUT/cache-train --eval_cache $OUT/cache-heldout $chosen $STUDENT --seed "$seed" \
    --output_dir "$folder" >"$folder/log.txt" 2>&1; then
    tail -n 5 "$folder/log.txt" >&2
    return 1
  fi
  printf '%-16s %s\n' "$loss, seed $seed" "$(grep 'held out' "$folder/log.txt" | tail -n 1)"
}

step "1. Instruction pairs from the Python standard library: signature → docstring, split by module"
run python tools/demo/extract_pairs.py --out "$OUT/pairs"

step "2. The teacher's log-probabilities, from vLLM, for both splits"
for split in train heldout; do
  run logitcache build --teacher tools/demo/teacher --data "$OUT/pairs/$split.jsonl" --out "$OUT/cache-$split" --keep id
done
run logitcache view "$OUT/cache-heldout" --out "$OUT/cache-heldout.html"

step "3. Students from these files, the teacher nowhere in memory: hard labels only, then four divergences, three seeds each"
printf '$ trainer fit --cache %s/cache-train --eval_cache %s/cache-heldout --loss LOSS --kd_weight 0.9 --seed SEED %s\n' $OUT $OUT "$STUDENT"
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  parallel=1
else
  # Small students: as many at a time as there are cores, with one thread each.
  parallel=$(nproc)
  export OMP_NUM_THREADS=1
fi
export -f fit
export OUT STUDENT
# shellcheck disable=SC2016  # $0 and $1 are the inner shell's
for loss in $LOSSES; do for seed in $SEEDS; do echo "$loss $seed"; done; done |
  xargs -P "$parallel" -L 1 bash -c 'set -o pipefail; fit "$0" "$1" || exit 255'

step "4. Which came closest to the teacher on modules that nobody trained on?"
# shellcheck disable=SC2046  # folders are words
run trainer compare $(for loss in $LOSSES; do for seed in $SEEDS; do echo "$OUT/students/$loss-$seed"; done; done) \
  --out "$OUT/compare.png"

cat <<END

caches    $OUT/cache-train, $OUT/cache-heldout (each with a README.md)
page      $OUT/cache-heldout.html (for a browser: what the teacher expected)
students  $OUT/students/LOSS-SEED
picture   $OUT/compare.png
took      $((SECONDS / 60)) min $((SECONDS % 60)) s
END
