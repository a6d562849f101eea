#!/usr/bin/env bash
# Makes results/: every number and figure of the README's PCFG tables. About an hour on two cores; restartable: what
# is done already is passed over. Two single-threaded runs side by side beat one run on two threads.
#
#     bash runs/pcfg.sh            # everything        PYTHON=path/to/python to choose an interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python}

go_on() {  # a checkpoint is resumed (or is done); a record without one, as in a fresh clone, is replaced
    [ -e "$1" ] && echo --resume || echo --force
}
pre() {  # prior name, --prior, seed
    out=results/pre/$1-$3.pt
    "$PYTHON" pretrain.py --prior "$2" --seed "$3" --out "$out" "$(go_on "$out")" --threads 1
}
tune() {  # out, seed, pretrained, further flags
    out=results/$1.pt seed=$2 from=$3; shift 3
    "$PYTHON" finetune.py --ckpt "results/pre/$from.pt" --seed "$seed" --out "$out" "$(go_on "$out")" --threads 1 "$@"
}
look() {  # checkpoint, further flags; an analysis is done when its verdict is younger than its checkpoint
    ckpt=results/$1; shift
    [ "$ckpt.verdict.json" -nt "$ckpt.pt" ] || "$PYTHON" analyze.py --ckpt "$ckpt.pt" --threads 1 "$@"
}
export -f go_on pre tune look

jobs_pre() {
    for seed in 0 1 2; do echo "pre low low $seed"; echo "pre high high $seed"; done
    echo "pre without-c .6,.4,0 0"  # the control of the high prior: it never had c
}
jobs_tune() {
    for seed in 0 1 2; do
        echo "tune count/low-$seed $seed low-$seed"                               # the main job
        echo "tune count/high-$seed $seed high-$seed --c-tr .5"                   # strongly relevant
        echo "tune count/learner-$seed $seed low-$seed --c-tr 0 --lr 1e-3"        # nothing to wrap: it has to learn
        echo "tune index/low-$seed $seed low-$seed --task index"                  # the Indexer
    done
    echo "tune control/without-c-0 0 without-c-0 --c-tr .5"                         # the control of high, tuned alike
}
jobs_look() {
    for seed in 0 1 2; do
        echo "look count/low-$seed"; echo "look count/high-$seed --control results/control/without-c-0.pt"
        echo "look count/learner-$seed"; echo "look index/low-$seed"
    done
}
jobs_grid() {
    for lr in 1e-5 1e-4 1e-3; do for c in 0 .5 .8 1; do for prior in low high; do
        echo "tune grid/$prior/ctr$c-lr$lr 0 $prior-0 --c-tr $c --lr $lr"
    done; done; done
}
for stage in ${STAGES:-jobs_pre jobs_tune jobs_look jobs_grid}; do
    $stage | tr '\n' '\0' | xargs -0 -P 2 -I{} bash -c "{}"
done
for folder in count index grid/low grid/high; do "$PYTHON" plot.py "results/$folder"; done
