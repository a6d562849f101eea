#!/usr/bin/env bash
# The evidence of stories, the paper's Table 1 and Figs. 11, 31-38 on the embedded corpus, about 25
# minutes a seed on two cores: a model pretrained with and one without twists, three deletions at
# two rates, their reverse fine-tunings and the control's, scores, probes.
#
#     bash results/stories.sh            # three seeds; how to print or move it: results/lanes.sh
#     SEEDS=0 bash results/stories.sh    # one
. "$(dirname "$0")/lanes.sh"
S=stories SEEDS=${SEEDS:-0 1 2}

jobs_pre() {
    for seed in $SEEDS; do
        echo "train $S/pre-$seed pretrain.py --setup stories --seed $seed"
        echo "train $S/never-$seed pretrain.py --setup stories --seed $seed --without Twist"
    done
}
tune() {  # protocol, rate, seed
    echo "train $S/$1-lr$2-$3 finetune.py --ckpt $OUT/$S/pre-$3.pt --protocol $1 --lr $2 --seed $3"
}
reverse() {  # run to make, run to reverse, seed
    echo "train $S/$1 finetune.py --reverse --ckpt $OUT/$S/$2.pt --seed $3"
}
jobs_tune() {
    for seed in $SEEDS; do
        for protocol in filter randomise mix-match; do
            for lr in 1.5e-4 4e-5; do
                run=$protocol-lr$lr-$seed
                echo "$(tune $protocol $lr $seed) && $(reverse $run-reft $run $seed)"
            done
        done
        reverse control-$seed never-$seed $seed  # never met a twist, taught in the same way
    done
    tune refuse 1.5e-4 "${SEEDS%% *}"
}
jobs_look() {
    for seed in $SEEDS; do
        for protocol in filter randomise mix-match; do
            echo "look $S/$protocol-lr1.5e-4-$seed --control $OUT/$S/never-$seed.pt --eval-size 250"
        done
    done
}
stages ${STAGES:-pre tune look}
evidence $S fig11_stories fig31_stories_loss fig32_stories_probe
run results/evidence.py
