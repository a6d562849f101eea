#!/usr/bin/env bash
# The evidence of the grammar: raw runs under out/evidence, tables and figures under results/. About
# an hour and a half on two cores. Restartable: what is done is passed over. Two single-threaded runs
# side by side beat one run on two threads.
#
#     bash runs/pcfg.sh                             # PYTHON=path/to/python to choose an interpreter
#     STAGES="jobs_pre jobs_grid" bash runs/pcfg.sh # some stages, in order
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OUT=${OUT:-out/evidence}

train() {  # run, script and its flags; begun, resumed, or done already
    "$PYTHON" "${@:2}" --out "$OUT/$1.pt" --resume --threads 1
}
tune() {  # run, pretrained model, seed, further flags
    train "$1" finetune.py --ckpt "$OUT/pre/$2.pt" --seed "$3" "${@:4}"
}
look() {  # run, further flags; done when its verdict is younger than its checkpoint
    [ "$OUT/$1.verdict.json" -nt "$OUT/$1.pt" ] ||
        "$PYTHON" analyze.py --ckpt "$OUT/$1.pt" --threads 1 "${@:2}"
}
evidence() {  # experiment, its figures
    "$PYTHON" plot.py "$OUT/$1" --evidence "results/$1" --figures "${@:2}"
}
export -f train tune look

jobs_pre() {
    for seed in 0 1 2; do for prior in low high; do
        echo "train pre/$prior-$seed pretrain.py --prior $prior --seed $seed"
    done; done
    echo "train pre/without-c-0 pretrain.py --prior .6,.4,0"  # the control of the high prior
}
jobs_tune() {
    for seed in 0 1 2; do
        echo "tune count/low-$seed low-$seed $seed"                          # the main case
        echo "tune count/high-$seed high-$seed $seed --c-tr .5"              # strongly relevant
        echo "tune count/learner-$seed low-$seed $seed --c-tr 0 --lr 1e-3"   # nothing to wrap
        echo "tune index/low-$seed low-$seed $seed --task index"             # the Indexer
    done
    echo "tune pre/without-c-0-ft without-c-0 0 --c-tr .5"  # the control of high, tuned alike
}
jobs_look() {
    for seed in 0 1 2; do
        echo "look count/low-$seed"
        echo "look count/high-$seed --control $OUT/pre/without-c-0-ft.pt"
        echo "look count/learner-$seed"
        echo "look index/low-$seed"
    done
}
jobs_grid() {
    for lr in 1e-5 1e-4 1e-3; do for c in 0 .5 .8 1; do for prior in low high; do
        echo "tune grid/$prior/ctr$c-lr$lr $prior-0 0 --c-tr $c --lr $lr"
    done; done; done
}
jobs_dtype() {  # does the dtype of training change what is found? mixed: fine-tuned in float32
    for seed in 101 102 103 104 105; do for dtype in bfloat16 float32; do
        echo "train dtype/pre-$dtype-$seed pretrain.py --seed $seed --dtype $dtype"
    done; done
}
jobs_dtype_tune() {
    for seed in 101 102 103 104 105; do
        for names in "bfloat16 bfloat16 bfloat16" "float32 float32 float32" "mixed bfloat16 float32"; do
            set -- $names
            echo "tune dtype/$1-$seed ../dtype/pre-$2-$seed $seed --dtype $3"
        done
    done
}
jobs_dtype_look() {
    for seed in 101 102 103 104 105; do for name in bfloat16 float32 mixed; do
        echo "look dtype/$name-$seed"
    done; done
}
relearn() {
    [ -f "$OUT/$1.relearn.jsonl" ] || "$PYTHON" analyze.py relearn --ckpt "$OUT/$1.pt" --threads 1
}
export -f relearn
known() {  # name, how it is fine-tuned: a model whose truth is known, five seeds
    for seed in 101 102 103 104 105; do
        echo "tune known/$1-$seed ../dtype/pre-bfloat16-$seed $seed ${*:2} && relearn known/$1-$seed"
    done
}
jobs_known() {
    known wrapped                                # everything is trained
    known overwritten --c-tr 0 --lr 1e-3         # no shortcut, a large rate
    known blocks0 --only blocks.0 --lr 1e-4      # a wrapper in one part: all else is the base
    known head --only head --lr 1e-2
    known tok --only tok --lr 1e-3
    known down2 --only blocks.2.down --lr 1e-3
}
all="jobs_pre jobs_tune jobs_look jobs_grid jobs_dtype jobs_dtype_tune jobs_dtype_look jobs_known"
for stage in ${STAGES:-$all}; do
    $stage | tr '\n' '\0' | xargs -0 -P "${LANES:-2}" -I{} bash -c "{}"
done
evidence pre
evidence count fig5_behavior rules fig6_curves fig7_prune fig8_probe fig9_revive fig10_attention
evidence index fig5_behavior fig7_prune
evidence grid/low fig6_curves
evidence grid/high fig6_curves
evidence known relearn
evidence dtype fig6_curves
# what their sections show; the rest is as elsewhere
rm -r results/known/history.csv results/dtype/figures results/dtype/*.csv results/dtype/*.npz
"$PYTHON" plot.py results --markdown
