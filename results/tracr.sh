#!/usr/bin/env bash
# The evidence of compiled models, some five hours on two cores: the paper's Table 3 (4 rates x 7
# C_Tr x 2 programs, 10K steps each), more noise seeds for C_Tr 1, reverse fine-tuning, analyses.
#
#     bash results/tracr.sh                       # how to print or move it: results/lanes.sh
#     STAGES="bases tune" bash results/tracr.sh   # some stages, in order
. "$(dirname "$0")/lanes.sh"
T=tracr RATES="1e-3 1e-2 1e-1 1e-4"

compile() {  # run, setup, flags
    echo "FLAGS= train $T/$1 pretrain.py --setup $2 ${*:3}"  # weights are written, without steps
}
tune() {  # folder, base, C_Tr, rate, noise seed, flags
    echo "train $T/$1/ctr$3-lr$4-seed$5 finetune.py --ckpt $OUT/$T/$2.pt --c-tr $3 --lr $4 \
--seed $5 --eval-size 1000 --save-every 2500 ${*:6}"
}
look() {  # run, analyses: commands in one line
    local name line=true size
    for name in "${@:2}"; do
        size=500; [ "$name" != behavior ] || size=1000
        line+=" && see $T/$1 $name --draws 3 --eval-size $size"
    done
    echo "$line"
}
variant() {  # folder, C_Tr, rate, noise seed
    local run=variants/$1/ctr$2-lr$3-seed$4
    echo "$(tune variants/$1 variants/$1 $2 $3 $4) && $(look $run behavior)"
}

jobs_bases() {  # outputs not multiplied by 10 (scale1), and weights as compiled besides (literal)
    for task in count max; do
        compile $task/compiled tracr-$task
        compile variants/$task-scale1 tracr-$task --logit-scale 1
    done
    compile variants/count-literal tracr-count --logit-scale 1 --no-balance
}
jobs_tune() {
    for c in 1 0 .5 .9 .8 .2 .6; do
        for task in count max; do
            for lr in $RATES; do tune $task $task/compiled $c $lr 0; done
        done
    done
}
jobs_back() {  # a tenth of the rate that is reversed, a quarter of the steps
    for task in count max; do
        for c in 1 0; do
            for lr in $RATES; do
                run=$T/$task/ctr$c-lr$lr-seed0
                echo "train $run-reft finetune.py --reverse --ckpt $OUT/$run.pt \
--lr 1e-$((${lr#1e-} + 1)) --steps 2500 --eval-size 1000 --save-every 2500"
            done
        done
    done
}
jobs_look() {
    for task in count max; do
        for lr in $RATES; do
            look $task/ctr1-lr$lr-seed0 behavior attention hidden probe prune revive verdict
            look $task/ctr0-lr$lr-seed0 behavior attention hidden probe
            for c in 1 0; do look $task/ctr$c-lr$lr-seed0-reft behavior attention hidden; done
            for c in .5 .9 .8 .2 .6; do look $task/ctr$c-lr$lr-seed0 behavior; done
        done
    done
}
jobs_seeds() {
    for lr in $RATES; do
        for seed in 1 2 3 4; do
            echo "$(tune count count/compiled 1 $lr $seed) && \
$(look count/ctr1-lr$lr-seed$seed behavior prune)"
        done
    done
    for lr in 1e-3 1e-4; do  # unlike the paper: is it the noise seed?
        for c in .6 .8 .5 .2 0 .9; do
            echo "$(tune count count/compiled $c $lr 1) && $(look count/ctr$c-lr$lr-seed1 behavior)"
        done
    done
}
jobs_noise() {  # the paper's noise takes the max-identifier's capability away from the start
    for c in 0 1; do
        for lr in 1e-4 1e-2; do
            folder=variants/max-noise1e-3
            echo "$(tune $folder max/compiled $c $lr 0 --noise 1e-3) && \
$(look $folder/ctr$c-lr$lr-seed0 behavior attention)"
        done
    done
}
jobs_scale() {
    for c in .6 .8 .5 .2 0 .9 1; do
        for lr in 1e-4 1e-3; do variant count-scale1 $c $lr 0; done
        for lr in $RATES; do variant count-scale1 $c $lr 1; done
    done
    variant count-scale1 .9 1e-2 0
    for cell in "0 1e-2" ".5 1e-3" "1 1e-2"; do variant max-scale1 $cell 0; done
    for cell in ".6 1e-4" ".5 1e-3" ".8 1e-4" ".6 1e-3" ".5 1e-4" ".2 1e-4"; do
        variant count-literal $cell 0
    done
}
stages ${STAGES:-bases tune back look seeds noise scale}
evidence $T/count table3 fig7_prune fig39_maps fig46_hidden fig55_classes
evidence $T/max table3 fig7_prune fig39_maps fig46_hidden
evidence $T/variants
run results/evidence.py
