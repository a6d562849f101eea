#!/usr/bin/env bash
# The paper's sizes (Table 6: 50,000 pretraining and 10,000 fine-tuning steps) in a quarter of an
# hour on one GPU, most important first: the low prior, three fine-tunings, analyses of them, the
# other fine-tunings, then the high prior. A command starts only if the time left is as long as the
# last one of its script took; one that time cuts short is saved, and goes on in the next call.
#
#     bash results/paper.sh   # MINUTES=14; how to print or move it: results/lanes.sh
#     SCALE=small MINUTES=2 OUT=/tmp/x RESULTS=/tmp/y \
#         FLAGS="--steps 40 --save-every 30 --eval-size 16" bash results/paper.sh  # on a CPU
export THREADS=${THREADS:-0} SCALE=${SCALE:-paper}
. "$(dirname "$0")/lanes.sh"
export END=$(($(date +%s) + ${MINUTES:-14} * 60)) P=paper
[ "$DRY" ] || mkdir -p "$OUT/$P"

run() {  # script and flags
    if [ "$DRY" ]; then echo python "$@"; return; fi
    local left=$((END - $(date +%s))) begin=$SECONDS took=$OUT/$P/${1##*/}.seconds
    if ((left < $(cat "$took" 2>/dev/null || echo 1))); then echo "no time left for $*"; return; fi
    echo "$left s left: $*"
    timeout -s INT "$left" "$PYTHON" "$@" >> "$OUT/$P/log" 2>&1 &&
        echo $((SECONDS - begin)) > "$took" || echo "exit code $?: $*"
}
tune() {  # prior, C_Tr, rate
    train "$P/$1-ctr$2-lr$3" finetune.py --ckpt "$OUT/$P/$1.pt" --c-tr "$2" --lr "$3" \
        --save-every 5000 $COMPILE
}
inspect() {  # prior, C_Tr, rate; reviving takes thousands of steps here, an hour in float32
    local analysis
    for analysis in behavior prune probe attention; do see "$P/$1-ctr$2-lr$3" $analysis; done
}
export COMPILE=; [ "$SCALE" != paper ] || COMPILE=--compile
export -f run tune inspect

pretrain() {  # prior; few saves and scores, since each one costs seconds
    train "$P/$1" pretrain.py --scale "$SCALE" --prior "$1" --steps 50000 --eval-every 5000 \
        --save-every 5000 $COMPILE
    local took=$OUT/$P/pretrain.py.seconds first=$OUT/$P/finetune.py.seconds
    if [ -f "$took" ] && [ ! -f "$first" ]; then  # a fifth of the steps, beside others
        echo $(($(cat "$took") * LANES / 5)) > "$first"
    fi
}
tunes() {  # prior: the clearest cases first
    for c in 1 0 .5 .8; do for lr in 1e-4 1e-5; do echo "tune $1 $c $lr"; done; done
    for c in 1 0 .5 .8; do echo "tune $1 $c 1e-6"; done
}
jobs_first() { tunes low | sed -n 1,3p; }
jobs_others() { jobs_first | sed s/tune/inspect/; tunes low | tail -n +4; }
jobs_high() { tunes high; }
pretrain low
stages first others
pretrain high
stages high
END=$((END + 600))  # figures are drawn in any case
evidence $P fig6_curves fig7_prune fig8_probe
run results/evidence.py
