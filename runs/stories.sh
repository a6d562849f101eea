#!/usr/bin/env bash
# The evidence of stories: the paper's Table 1 and Figs. 11, 31-38 on the embedded corpus. For each
# seed a model pretrained with and one without twists, three deletions at two rates, their reverse
# fine-tunings and the control's, scores, probes. About 25 minutes a seed on two cores. Raw runs
# under out/evidence, tables and figures under results/. Restartable: what is done is passed over.
#
#     bash runs/stories.sh             # three seeds; PYTHON=path/to/python to choose an interpreter
#     SEEDS=0 bash runs/stories.sh     # one
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OUT=${OUT:-out/evidence}/stories OMP_NUM_THREADS=1

train() {  # run, script and its flags; begun, resumed, or done already
    "$PYTHON" "${@:2}" --out "$OUT/$1.pt" --resume --threads 1
}
reverse() {  # run to make, run to reverse, seed
    train "$1" finetune.py --reverse --ckpt "$OUT/$2.pt" --seed "$3"
}
tune() {  # protocol, rate, seed: delete, revive
    local run=$1-lr$2-$3
    train "$run" finetune.py --ckpt "$OUT/pre-$3.pt" --protocol "$1" --lr "$2" --seed "$3"
    [ "$1" = refuse ] || reverse "$run-reft" "$run" "$3"
}
look() {  # run, seed; done when its verdict is younger than its checkpoint
    [ "$OUT/$1-$2.verdict.json" -nt "$OUT/$1-$2.pt" ] ||
        "$PYTHON" analyze.py --ckpt "$OUT/$1-$2.pt" --control "$OUT/never-$2.pt" --eval-size 250 \
            --threads 1
}
export -f train reverse tune look

jobs_pre() {
    for seed; do
        echo "train pre-$seed pretrain.py --setup stories --seed $seed"
        echo "train never-$seed pretrain.py --setup stories --seed $seed --without Twist"
    done
}
jobs_tune() {
    for seed; do
        for protocol in filter randomise mix-match; do for lr in 1.5e-4 4e-5; do
            echo "tune $protocol $lr $seed"
        done; done
        echo "reverse control-$seed never-$seed $seed"  # never met a twist, taught in the same way
    done
    echo "tune refuse 1.5e-4 $1"
}
jobs_look() {
    for seed; do for protocol in filter randomise mix-match; do
        echo "look $protocol-lr1.5e-4 $seed"
    done; done
}
for stage in pre tune look; do
    "jobs_$stage" ${SEEDS:-0 1 2} | tr '\n' '\0' | xargs -0 -P "${LANES:-2}" -I{} bash -c "{}"
done
"$PYTHON" plot.py "$OUT" --evidence results/stories
"$PYTHON" plot.py results --markdown
