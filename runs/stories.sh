#!/usr/bin/env bash
# Makes results/stories: the paper's Table 1 and Figs. 11, 31-38 on the embedded corpus. For each seed a model pretrained
# with and one without twists, three deletions at two rates, their reverse fine-tunings and the control's, scores, probes.
# About 25 minutes a seed on two cores; restartable: what is done already is passed over.
#
#     bash runs/stories.sh               # three seeds       PYTHON=path/to/python to choose an interpreter
#     SEEDS=0 bash runs/stories.sh       # one
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OMP_NUM_THREADS=1

train() {  # checkpoint, script and its flags; a checkpoint is resumed (or is done), a record alone (a fresh clone) replaced
    local out=results/stories/$1.pt; shift
    "$PYTHON" "$@" --out "$out" "$([ -e "$out" ] && echo --resume || echo --force)" --threads 1
}
pre() {  # name, seed, further flags
    train "$1-$2" pretrain.py --setup stories --seed "$2" "${@:3}"
}
tune() {  # protocol, rate, seed: delete, revive
    local run=$1-lr$2-$3
    train "$run" finetune.py --ckpt "results/stories/pre-$3.pt" --protocol "$1" --lr "$2" --seed "$3"
    [ "$1" = refuse ] || train "$run-reft" finetune.py --reverse --ckpt "results/stories/$run.pt" --seed "$3"
}
control() {  # seed: a model that never met a twist, taught in the same way
    train "control-$1" finetune.py --reverse --ckpt "results/stories/never-$1.pt" --seed "$1"
}
look() {  # run, seed; done when its rows are younger than its checkpoint
    local ckpt=results/stories/$1-$2
    [ "$ckpt.probe.jsonl" -nt "$ckpt.pt" ] ||
        "$PYTHON" analyze.py --ckpt "$ckpt.pt" --control "results/stories/never-$2.pt" --eval-size 250 --threads 1
}
export -f train pre tune control look

jobs_pre() { for seed; do echo "pre pre $seed"; echo "pre never $seed --without Twist"; done; }
jobs_tune() {
    for seed; do
        for protocol in filter randomise mix-match; do for lr in 1.5e-4 4e-5; do echo "tune $protocol $lr $seed"; done; done
        echo "control $seed"
    done
    echo "tune refuse 1.5e-4 $1"
}
jobs_look() { for seed; do for protocol in filter randomise mix-match; do echo "look $protocol-lr1.5e-4 $seed"; done; done; }
for stage in pre tune look; do
    "jobs_$stage" ${SEEDS:-0 1 2} | tr '\n' '\0' | xargs -0 -P "${LANES:-2}" -I{} bash -c "{}"
done
"$PYTHON" runs/stories_table.py
"$PYTHON" plot.py results/stories
