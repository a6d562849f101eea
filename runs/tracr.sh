#!/usr/bin/env bash
# Makes results/tracr*: the paper's Table 3 (4 rates x 7 C_Tr x 2 tasks, 10K steps each), more noise seeds for C_Tr 1,
# reverse fine-tuning, analyses and figures. Some four hours on two cores, restartable: what is done already is passed
# over. Two single-threaded runs side by side beat one run on two threads.
#
#     bash runs/tracr.sh                        # everything        PYTHON=path/to/python to choose an interpreter
#     STAGES="pre tune" bash runs/tracr.sh      # some stages: pre tune seeds back look
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OMP_NUM_THREADS=1
RATES="1e-3 1e-2 1e-1 1e-4"

go_on() {  # a checkpoint is resumed (or is done); a record without one, as in a fresh clone, is replaced
    [ -e "$1" ] && echo --resume || echo --force
}
pre() {  # count or max
    out=results/tracr/$1.pt
    "$PYTHON" pretrain.py --setup "tracr-$1" --out "$out" "$(go_on "$out")" --threads 1
}
tune() {  # count or max, C_Tr, lr, seed: fine-tuning, then what the model answers and by which rule
    out=results/tracr/$1/ctr$2-lr$3-seed$4.pt
    "$PYTHON" finetune.py --ckpt "results/tracr/$1.pt" --c-tr "$2" --lr "$3" --seed "$4" --out "$out" "$(go_on "$out")" \
        --eval-size 1000 --save-every 2500 --threads 1 2> /dev/null
    look "$1/ctr$2-lr$3-seed$4" behavior
}
back() {  # run, lr of the reverse: reFT for a quarter of the steps
    out=results/tracr/$1-reft.pt
    "$PYTHON" finetune.py --reverse --ckpt "results/tracr/$1.pt" --lr "$2" --steps 2500 --out "$out" "$(go_on "$out")" \
        --eval-size 1000 --save-every 2500 --threads 1 2> /dev/null
    look "$1-reft" behavior attention hidden
}
look() {  # run, analyses; one is done when its rows are younger than the checkpoint
    run=results/tracr/$1; shift
    for name in "$@"; do
        [ "$run.$name.jsonl" -nt "$run.pt" ] || "$PYTHON" analyze.py "$name" --ckpt "$run.pt" --threads 1 --draws 3 \
            $([ "$name" = behavior ] && echo --eval-size 1000) 2> /dev/null
    done
}
export -f go_on pre tune look back

jobs_pre() { echo "pre count"; echo "pre max"; }
jobs_tune() {
    for task in count max; do for c in 1 0 .5 .9 .8 .2 .6; do for lr in $RATES; do echo "tune $task $c $lr 0"; done; done; done
}
jobs_seeds() { for seed in 1 2 3 4; do for lr in $RATES; do echo "tune count 1 $lr $seed"; done; done; }
jobs_back() {  # at a tenth of the rate that is reversed
    for task in count max; do for c in 1 0; do
        echo "back $task/ctr$c-lr1e-1-seed0 1e-2"; echo "back $task/ctr$c-lr1e-2-seed0 1e-3"
        echo "back $task/ctr$c-lr1e-3-seed0 1e-4"; echo "back $task/ctr$c-lr1e-4-seed0 1e-5"
    done; done
}
jobs_look() {
    for lr in $RATES; do for seed in 0 1 2 3 4; do echo "look count/ctr1-lr$lr-seed$seed prune"; done; done
    for lr in $RATES; do for c in 1 0; do for task in count max; do
        echo "look $task/ctr$c-lr$lr-seed0 attention hidden probe"
    done; done; done
    for lr in $RATES; do echo "look max/ctr1-lr$lr-seed0 prune revive"; echo "look count/ctr1-lr$lr-seed0 revive"; done
}
for stage in ${STAGES:-pre tune seeds back look}; do
    "jobs_$stage" | tr '\n' '\0' | xargs -0 -P "${LANES:-2}" -I{} bash -c "{}"
done
"$PYTHON" runs/tracr_table.py
for task in count max; do "$PYTHON" plot.py "results/tracr/$task"; done
