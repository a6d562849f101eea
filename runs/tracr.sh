#!/usr/bin/env bash
# Makes results/tracr*: the paper's Table 3 (4 rates x 7 C_Tr x 2 tasks, 10K steps each), more noise seeds for C_Tr 1,
# reverse fine-tuning, analyses and figures. Some five hours on two cores, restartable: where rows are there, also in a
# fresh clone without the checkpoints, nothing is done again (but compiling, which takes a second). Two single-threaded
# runs side by side beat one on two threads.
#
#     bash runs/tracr.sh                        # everything        PYTHON=path/to/python to choose an interpreter
#     STAGES="look tune" bash runs/tracr.sh     # some stages, in order: look back tune seeds noise scale
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OMP_NUM_THREADS=1
RATES="1e-3 1e-2 1e-1 1e-4"

train() {  # checkpoint, script and its flags: resumed, or started anew where only the record is left, as in a fresh clone
    local out=results/tracr/$1.pt; shift
    "$PYTHON" "$@" --out "$out" "$([ -e "$out" ] && echo --resume || echo --force)" --threads 1
}
need() {  # run: its checkpoint, made or finished if it is not there
    [ -e "results/tracr/$1.pt" ] && grep -q '"seconds"' "results/tracr/$1.json" && return
    local task=${1%%/*} name=${1##*/} c lr seed noise=()
    case $name in
        count | max) train "$name" pretrain.py --setup "tracr-$name" ;;
        count-scale1 | max-scale1) train "$name" pretrain.py --setup "tracr-${name%-scale1}" --logit-scale 1 ;;
        count-literal) train "$name" pretrain.py --setup tracr-count --logit-scale 1 --no-balance ;;
        *-reft)  # a tenth of the rate that is reversed, a quarter of the steps
            need "${1%-reft}"; lr=${name#*-lr}; lr=${lr%%-seed*}
            train "$1" finetune.py --reverse --ckpt "results/tracr/${1%-reft}.pt" --lr "1e-$((${lr#1e-} + 1))" --steps 2500 \
                --eval-size 1000 --save-every 2500 ;;
        *)
            c=${name#ctr}; lr=${name#*-lr}; seed=${name#*-seed}
            case $name in *-noise*) noise=(--noise "${name#*-noise}") ;; esac
            need "$task"
            train "$1" finetune.py --ckpt "results/tracr/$task.pt" --c-tr "${c%%-*}" --lr "${lr%%-seed*}" --seed "${seed%%-*}" \
                ${noise[@]+"${noise[@]}"} --eval-size 1000 --save-every 2500 ;;
    esac
}
look() {  # run, analyses: those whose rows are not there
    local run=$1 name size; shift
    for name in "$@"; do
        [ -e "results/tracr/$run.$name.jsonl" ] && continue
        need "$run"
        size=500; [ "$name" = behavior ] && size=1000
        "$PYTHON" analyze.py "$name" --ckpt "results/tracr/$run.pt" --threads 1 --draws 3 --eval-size $size
    done
}
judge() {  # run: the verdict on rows that are there
    [ -e "results/tracr/$1.verdict.json" ] || { need "$1"; "$PYTHON" analyze.py verdict --ckpt "results/tracr/$1.pt"; }
}
export -f train need look judge

jobs_tune() {
    for c in 1 0 .5 .9 .8 .2 .6; do for task in count max; do for lr in $RATES; do
        echo "look $task/ctr$c-lr$lr-seed0 behavior"
    done; done; done
}
jobs_look() {  # the two that are told of in detail: the relation always, never
    for c in 1 0; do for lr in $RATES; do for task in count max; do
        echo "look $task/ctr$c-lr$lr-seed0 behavior attention hidden probe"
    done; done; done
    for lr in $RATES; do for task in count max; do
        echo "look $task/ctr1-lr$lr-seed0 prune revive; judge $task/ctr1-lr$lr-seed0"
    done; done
}
jobs_back() {
    for task in count max; do for c in 1 0; do for lr in $RATES; do
        echo "look $task/ctr$c-lr$lr-seed0-reft behavior attention hidden"
    done; done; done
}
jobs_seeds() {
    for lr in $RATES; do for seed in 1 2 3 4; do echo "look count/ctr1-lr$lr-seed$seed behavior prune"; done; done
    for lr in 1e-3 1e-4; do for c in .6 .8 .5 .2 0 .9; do  # where we differ from the paper: is it the noise seed?
        echo "look count/ctr$c-lr$lr-seed1 behavior"
    done; done
}
jobs_noise() {  # the max-identifier with the paper's noise, which takes its capability away before any fine-tuning
    for c in 0 1; do for lr in 1e-4 1e-2; do echo "look max/ctr$c-lr$lr-seed0-noise1e-3 behavior attention"; done; done
}
jobs_scale() {  # where we differ from the paper: outputs that are not multiplied by 10 (scale1), and besides that weights as
    # compiled, which the noise breaks (literal)
    for lr in 1e-4 1e-3; do for c in .6 .8 .5 .2 0 .9 1; do echo "look count-scale1/ctr$c-lr$lr-seed0 behavior"; done; done
    for lr in $RATES; do for c in .6 .8 .5 .2 0 .9 1; do echo "look count-scale1/ctr$c-lr$lr-seed1 behavior"; done; done
    for run in count-scale1/ctr.9-lr1e-2 max-scale1/ctr0-lr1e-2 max-scale1/ctr.5-lr1e-3 max-scale1/ctr1-lr1e-2; do
        echo "look $run-seed0 behavior"
    done
    for run in .6-lr1e-4 .5-lr1e-3 .8-lr1e-4 .6-lr1e-3 .5-lr1e-4 .2-lr1e-4; do
        echo "look count-literal/ctr$run-seed0 behavior"
    done
}
need count; need count-scale1; need count-literal
need max; need max-scale1
for stage in ${STAGES:-look back tune seeds noise scale}; do
    "jobs_$stage" | tr '\n' '\0' | xargs -0 -P "${LANES:-2}" -I{} bash -c "{}"
done
"$PYTHON" runs/tracr_table.py
for task in count max; do "$PYTHON" plot.py "results/tracr/$task"; done
