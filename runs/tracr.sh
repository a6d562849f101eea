#!/usr/bin/env bash
# The evidence of compiled models: the paper's Table 3 (4 rates x 7 C_Tr x 2 programs, 10K steps
# each), more noise seeds for C_Tr 1, reverse fine-tuning, analyses and figures. Some five hours on
# two cores. Raw runs under out/evidence, tables and figures under results/. Restartable: what is
# done is passed over.
#
#     bash runs/tracr.sh                       # PYTHON=path/to/python to choose an interpreter
#     STAGES="look tune" bash runs/tracr.sh    # some stages: look back tune seeds noise scale
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OUT=${OUT:-out/evidence}/tracr OMP_NUM_THREADS=1
RATES="1e-3 1e-2 1e-1 1e-4"

train() {  # run, script and its flags; begun, resumed, or done already
    "$PYTHON" "${@:2}" --out "$OUT/$1.pt" --resume --threads 1
}
need() {  # a run is made or finished, and what it starts from
    [ -e "$OUT/$1.pt" ] && grep -q '"seconds"' "$OUT/$1.json" && return
    local folder=${1%/*} name=${1##*/} base flags=()
    case $1 in
        */compiled) train "$1" pretrain.py --setup "tracr-$folder" ;;
        variants/*-scale1)
            train "$1" pretrain.py --setup "tracr-${name%-*}" --logit-scale 1 ;;
        variants/*-literal)
            train "$1" pretrain.py --setup "tracr-${name%-*}" --logit-scale 1 --no-balance ;;
        *-reft)  # a tenth of the rate that is reversed, a quarter of the steps
            local lr=${name#*-lr}; lr=${lr%%-seed*}
            need "${1%-reft}"
            train "$1" finetune.py --reverse --ckpt "$OUT/${1%-reft}.pt" \
                --lr "1e-$((${lr#1e-} + 1))" --steps 2500 --eval-size 1000 --save-every 2500 ;;
        *)  # ctr<C_Tr>-lr<rate>-seed<seed>
            local c=${name#ctr} lr=${name#*-lr}
            case $folder in
                *-noise*) base=max/compiled flags=(--noise "${folder##*-noise}") ;;
                variants/*) base=$folder ;;
                *) base=$folder/compiled ;;
            esac
            need "$base"
            train "$1" finetune.py --ckpt "$OUT/$base.pt" --c-tr "${c%%-*}" --lr "${lr%%-seed*}" \
                --seed "${name#*-seed}" ${flags[@]+"${flags[@]}"} --eval-size 1000 \
                --save-every 2500 ;;
    esac
}
look() {  # run, analyses: those without rows, or the verdict
    local run=$1 name size; shift
    for name in "$@"; do
        [ -e "$OUT/$run.$name.jsonl" ] || [ -e "$OUT/$run.$name.json" ] && continue
        need "$run"
        size=500; [ "$name" = behavior ] && size=1000
        "$PYTHON" analyze.py "$name" --ckpt "$OUT/$run.pt" --threads 1 --draws 3 --eval-size $size
    done
}
export -f train need look

jobs_look() {  # the relation always and never, in detail
    for c in 1 0; do for lr in $RATES; do for task in count max; do
        echo "look $task/ctr$c-lr$lr-seed0 behavior attention hidden probe"
    done; done; done
    for lr in $RATES; do for task in count max; do
        echo "look $task/ctr1-lr$lr-seed0 prune revive verdict"
    done; done
}
jobs_back() {
    for task in count max; do for c in 1 0; do for lr in $RATES; do
        echo "look $task/ctr$c-lr$lr-seed0-reft behavior attention hidden"
    done; done; done
}
jobs_tune() {
    for c in 1 0 .5 .9 .8 .2 .6; do for task in count max; do for lr in $RATES; do
        echo "look $task/ctr$c-lr$lr-seed0 behavior"
    done; done; done
}
jobs_seeds() {
    for lr in $RATES; do for seed in 1 2 3 4; do
        echo "look count/ctr1-lr$lr-seed$seed behavior prune"
    done; done
    for lr in 1e-3 1e-4; do for c in .6 .8 .5 .2 0 .9; do  # unlike the paper: is it the noise seed?
        echo "look count/ctr$c-lr$lr-seed1 behavior"
    done; done
}
jobs_noise() {  # the paper's noise takes the max-identifier's capability away from the start
    for c in 0 1; do for lr in 1e-4 1e-2; do
        echo "look variants/max-noise1e-3/ctr$c-lr$lr-seed0 behavior attention"
    done; done
}
jobs_scale() {  # outputs not multiplied by 10 (scale1), and weights as compiled besides (literal)
    for c in .6 .8 .5 .2 0 .9 1; do
        for lr in 1e-4 1e-3; do echo "look variants/count-scale1/ctr$c-lr$lr-seed0 behavior"; done
        for lr in $RATES; do echo "look variants/count-scale1/ctr$c-lr$lr-seed1 behavior"; done
    done
    for run in count-scale1/ctr.9-lr1e-2 max-scale1/ctr0-lr1e-2 max-scale1/ctr.5-lr1e-3 \
        max-scale1/ctr1-lr1e-2; do
        echo "look variants/$run-seed0 behavior"
    done
    for run in .6-lr1e-4 .5-lr1e-3 .8-lr1e-4 .6-lr1e-3 .5-lr1e-4 .2-lr1e-4; do
        echo "look variants/count-literal/ctr$run-seed0 behavior"
    done
}
for run in count/compiled max/compiled variants/count-scale1 variants/max-scale1 \
    variants/count-literal; do need "$run"; done
for stage in ${STAGES:-look back tune seeds noise scale}; do
    "jobs_$stage" | tr '\n' '\0' | xargs -0 -P "${LANES:-2}" -I{} bash -c "{}"
done
evidence() {  # folder, its figures
    "$PYTHON" plot.py "$OUT/$1" --evidence "results/tracr/$1" --figures "${@:2}"
}
evidence count table3 fig7_prune fig39_maps fig46_hidden fig55_classes
evidence max table3 fig7_prune fig39_maps fig46_hidden
evidence variants
rm -f results/tracr/*/revive.curve.csv results/tracr/variants/{attention,behavior}.csv
"$PYTHON" plot.py results --markdown
