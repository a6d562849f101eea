#!/usr/bin/env bash
# The evidence of stories, the paper's Table 1 and Figs. 11, 31-38 on the embedded corpus, about 45
# minutes a seed on one core: a model pretrained with and one without twists, deletions, reverse
# fine-tunings and the control's, scores, probes, held-out relearning.
#
#     bash results/stories.sh            # five seeds; how to print or move it: results/lanes.sh
#     SEEDS=1 bash results/stories.sh    # one
#     STAGES=look bash results/stories.sh  # some stages, in order
. "$(dirname "$0")/lanes.sh"
S=stories SEEDS=${SEEDS:-1 2 3 4 5}

jobs_pre() {
    for seed in $SEEDS; do
        echo "train $S/pre-$seed pretrain.py --setup stories --seed $seed"
        echo "train $S/never-$seed pretrain.py --setup stories --seed $seed --without Twist"
    done
}
reverse() {  # run to make, run to reverse, seed
    echo "train $S/$1 finetune.py --reverse --ckpt $OUT/$S/$2.pt --seed $3 --eval-every 50"
}
tune() {  # protocol, rate, seed: delete, then bring back
    echo "train $S/$1-lr$2-$3 finetune.py --ckpt $OUT/$S/pre-$3.pt --protocol $1 --lr $2 \
--seed $3 --eval-every 50 && $(reverse $1-lr$2-$3-reft $1-lr$2-$3 $3)"
}
jobs_tune() {
    for seed in $SEEDS; do
        tune randomise 1.5e-4 $seed
        tune mix-match 1.5e-4 $seed
        reverse control-$seed never-$seed $seed  # never met a twist, taught in the same way
    done
}
jobs_look() {
    local seed run control
    for seed in $SEEDS; do
        run=$S/randomise-lr1.5e-4-$seed control="--control $OUT/$S/never-$seed.pt"
        echo "see $run relearn --eval-size 400 $control && \
look $run behavior probe verdict --eval-size 200 $control"
    done
}
jobs_rest() {  # the paper's third protocol, a smaller rate, and refusals: fewer seeds
    local few; few=$(set -- $SEEDS; echo ${*:1:3})
    for seed in $few; do tune filter 1.5e-4 $seed; done
    for seed in $few; do tune randomise 4e-5 $seed; tune mix-match 4e-5 $seed; done
    tune refuse 1.5e-4 "${SEEDS%% *}"
}
stages ${STAGES:-pre tune look rest}
evidence $S fig11_stories fig31_stories_loss fig32_stories_probe relearn
run results/evidence.py
