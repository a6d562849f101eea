#!/usr/bin/env bash
# Held-out relearning beyond the grammar, about 40 minutes on two cores: the compiled Counter,
# wrapped (C_Tr 1 at 1e-3, five noise seeds) and rewired (C_Tr 0 at 1e-2, two); stories whose twist
# was deleted, beside models that never met one (two seeds).
#
#     bash results/relearn.sh                  # how to print, shorten or move it: results/lanes.sh
#     STAGES=counter bash results/relearn.sh   # some stages, in order
. "$(dirname "$0")/lanes.sh"
R=relearn SEEDS=${SEEDS:-0 1}

jobs_pre() {
    echo "FLAGS= train $R/compiled pretrain.py --setup tracr-count"
    for seed in $SEEDS; do
        echo "train $R/stories-$seed pretrain.py --setup stories --seed $seed"
        echo "train $R/never-$seed pretrain.py --setup stories --seed $seed --without Twist"
    done
}
counter() {  # name, noise seed, C_Tr, rate
    local run=$R/counter-$1-$2
    echo "train $run finetune.py --ckpt $OUT/$R/compiled.pt --c-tr $3 --lr $4 --seed $2 \
--save-every 2500 && see $run relearn"
}
jobs_counter() {
    for seed in 0 1 2 3 4; do counter wrapped $seed 1 1e-3; done
    for seed in 0 1; do counter rewired $seed 0 1e-2; done
}
jobs_stories() {
    for seed in $SEEDS; do
        run=$R/randomise-$seed
        echo "train $run finetune.py --ckpt $OUT/$R/stories-$seed.pt --seed $seed && \
see $run relearn --eval-size 200 --control $OUT/$R/never-$seed.pt"
    done
}
stages ${STAGES:-pre counter stories}
evidence $R relearn
run results/evidence.py
