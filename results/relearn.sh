#!/usr/bin/env bash
# Held-out relearning beyond the grammar, about 20 minutes on two cores: the compiled Counter,
# wrapped (C_Tr 1 at 1e-3, five noise seeds) and rewired (C_Tr 0 at 1e-2, two). That of stories is
# in stories.sh.
#
#     bash results/relearn.sh                  # how to print, shorten or move it: results/lanes.sh
#     STAGES=counter bash results/relearn.sh   # some stages, in order
. "$(dirname "$0")/lanes.sh"
R=relearn

jobs_pre() {
    echo "FLAGS= train $R/compiled pretrain.py --setup tracr-count"
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
stages ${STAGES:-pre counter}
evidence $R relearn
run results/evidence.py
