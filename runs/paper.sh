#!/usr/bin/env bash
# The paper's sizes (Table 6: 50,000 pretraining and 10,000 fine-tuning steps) in a quarter of an hour
# on one GPU, most important first: the low prior, three fine-tunings, what is inside them, the
# other fine-tunings, then the high prior. A job starts only if the time left is as long as the last
# one of its kind took; one that time cuts short is saved. Restartable: what is done is passed over.
#
#     bash runs/paper.sh                                  # MINUTES=14 PYTHON=path/to/python
#     SCALE=small STEPS=40 MINUTES=2 bash runs/paper.sh   # a rehearsal on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OUT=${OUT:-out/evidence/paper} SCALE=${SCALE:-paper} LANES=${LANES:-2}
export END=$(($(date +%s) + ${MINUTES:-14} * 60))
mkdir -p "$OUT"

job() {  # kind of job, script and flags
    local left=$((END - $(date +%s))) begin=$SECONDS
    local took; took=$(cat "$OUT/$1.seconds" 2>/dev/null || echo 1)
    if ((left < took)); then
        echo "no time left for ${*:2}"
        return
    fi
    echo "$left s left: ${*:2}"
    timeout -s INT "$left" "$PYTHON" "${@:2}" >> "$OUT/log" 2>&1 &&
        echo $((SECONDS - begin)) > "$OUT/$1.seconds" || echo "exit code $?: ${*:2}"
}
train() {  # kind, run, script and flags: few saves and scores, since each one costs seconds
    local often=5000 compile=--compile
    [ "$SCALE" = paper ] || { often=30; compile=; }
    job "$1" "${@:3}" --out "$OUT/$2.pt" --resume --save-every "$often" $compile
}
pretrain() {  # prior
    train pretrain "$1" pretrain.py --scale "$SCALE" --prior "$1" --eval-every $((${STEPS:-50000} / 10)) \
        ${STEPS:+--steps "$STEPS"}
    # the first guess: a fifth of the steps, beside others
    [ -f "$OUT/finetune.seconds" ] || [ ! -f "$OUT/pretrain.seconds" ] ||
        echo $(($(cat "$OUT/pretrain.seconds") * LANES / 5)) > "$OUT/finetune.seconds"
}
tune() {  # prior, C_Tr, rate
    train finetune "$1-ctr$2-lr$3" finetune.py --ckpt "$OUT/$1.pt" --c-tr "$2" --lr "$3" \
        ${STEPS:+--steps "$STEPS"}
}
look() {  # prior, C_Tr, rate; reviving takes thousands of steps here, an hour in float32
    job analyze analyze.py behavior prune probe attention --ckpt "$OUT/$1-ctr$2-lr$3.pt"
}
export -f job train tune look
lanes() {
    xargs -P "$LANES" -I{} bash -c "{}"
}
tunes() {  # prior: "tune prior C_Tr rate" a line, the clearest cases first
    for c in 1 0 .5 .8; do for lr in 1e-4 1e-5; do echo "tune $1 $c $lr"; done; done
    for c in 1 0 .5 .8; do echo "tune $1 $c 1e-6"; done
}
pretrain low
tunes low | head -n 3 | lanes
{ tunes low | head -n 3 | sed s/tune/look/; tunes low | tail -n +4; } | lanes
pretrain high
tunes high | lanes
"$PYTHON" plot.py "$OUT" --evidence "${RESULTS:-results/paper}" --figures fig6_curves fig7_prune fig8_probe
