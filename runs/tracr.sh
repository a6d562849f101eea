#!/usr/bin/env bash
# Makes results/tracr*: the paper's Table 3 (4 rates x 7 C_Tr x 2 tasks, 10K steps each), more noise seeds for C_Tr 1,
# reverse fine-tuning, analyses and figures. Hours on two cores, restartable: what is done already is passed over. Two
# single-threaded runs side by side beat one run on two threads.
#
#     bash runs/tracr.sh           # everything        PYTHON=path/to/python to choose an interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OMP_NUM_THREADS=1

go_on() {  # a checkpoint is resumed (or is done); a record without one, as in a fresh clone, is replaced
    [ -e "$1" ] && echo --resume || echo --force
}
pre() {  # setup
    out=results/tracr/$1.pt
    "$PYTHON" pretrain.py --setup "tracr-$1" --out "$out" "$(go_on "$out")" --threads 1
}
tune() {  # count or max, C_Tr, lr, seed: fine-tuning, what the model then answers and by which rule
    out=results/tracr/$1/ctr$2-lr$3-seed$4.pt
    "$PYTHON" finetune.py --ckpt "results/tracr/$1.pt" --c-tr "$2" --lr "$3" --seed "$4" --out "$out" "$(go_on "$out")" \
        --eval-size 1000 --save-every 2500 --threads 1 2> /dev/null
    look "$1" "$2" "$3" "$4" behavior --eval-size 1000
}
look() {  # count or max, C_Tr, lr, seed, analysis, further flags
    run=results/tracr/$1/ctr$2-lr$3-seed$4 name=$5; shift 5
    [ "$run.$name.jsonl" -nt "$run.pt" ] || "$PYTHON" analyze.py "$name" --ckpt "$run.pt" --threads 1 "$@" 2> /dev/null
}
back() {  # count or max, C_Tr, lr of the fine-tuning, lr of the reverse: reFT for a quarter of the steps
    run=results/tracr/$1/ctr$2-lr$3-seed0 out=results/tracr/$1/ctr$2-lr$3-reft.pt
    "$PYTHON" finetune.py --reverse --ckpt "$run.pt" --lr "$4" --steps 2500 --out "$out" "$(go_on "$out")" \
        --eval-size 1000 --save-every 2500 --threads 1 2> /dev/null
}
export -f go_on pre tune look back

jobs_pre() { echo "pre count"; echo "pre max"; }
jobs_tune() {
    for c in 1 0; do for lr in 1e-3 1e-2 1e-1 1e-4; do echo "tune count $c $lr 0"; done; done
    for lr in 1e-3 1e-2 1e-1 1e-4; do for c in 1 0; do echo "tune max $c $lr 0"; done; done
    for c in .5 .9 .8 .2 .6; do for lr in 1e-3 1e-2 1e-1 1e-4; do
        echo "tune count $c $lr 0"; echo "tune max $c $lr 0"
    done; done
}
jobs_seeds() { for seed in 1 2 3 4; do for lr in 1e-3 1e-2 1e-1 1e-4; do echo "tune count 1 $lr $seed"; done; done; }
for stage in ${STAGES:-jobs_pre jobs_tune jobs_seeds}; do
    $stage | tr '\n' '\0' | xargs -0 -P "${LANES:-2}" -I{} bash -c "{}"
done
