#!/usr/bin/env bash
# Held-out relearning beyond the grammar: the compiled Counter, wrapped (C_Tr 1 at 1e-3) and rewired
# (C_Tr 0 at 1e-2), five and two noise seeds; stories whose twist was deleted, beside models that
# never met one, two seeds. About 40 minutes on two cores. Raw runs under out/evidence, tables and
# figures under results/. Restartable: what is done is passed over.
#
#     bash runs/relearn.sh                     # PYTHON=path/to/python to choose an interpreter
#     STAGES=jobs_counter bash runs/relearn.sh # some stages, in order
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OUT=${OUT:-out/evidence}/relearn OMP_NUM_THREADS=1

train() {  # run, script and its flags; begun, resumed, or done already
    "$PYTHON" "${@:2}" --out "$OUT/$1.pt" --resume --threads 1
}
see() {  # run, analysis and its flags
    [ -f "$OUT/$1.$2.jsonl" ] || "$PYTHON" analyze.py "${@:2}" --ckpt "$OUT/$1.pt" --threads 1
}
export -f train see

jobs_pre() {
    echo "train compiled pretrain.py --setup tracr-count"
    for seed in ${SEEDS:-0 1}; do
        echo "train stories-$seed pretrain.py --setup stories --seed $seed"
        echo "train never-$seed pretrain.py --setup stories --seed $seed --without Twist"
    done
}
counter() {  # name, noise seed, C_Tr, rate
    echo "train counter-$1-$2 finetune.py --ckpt $OUT/compiled.pt --c-tr $3 --lr $4 --seed $2 \
        --save-every 2500 && see counter-$1-$2 relearn"
}
jobs_counter() {
    for seed in 0 1 2 3 4; do counter wrapped $seed 1 1e-3; done
    for seed in 0 1; do counter rewired $seed 0 1e-2; done
}
jobs_stories() {
    for seed in ${SEEDS:-0 1}; do
        echo "train randomise-$seed finetune.py --ckpt $OUT/stories-$seed.pt --seed $seed && \
            see randomise-$seed relearn --eval-size 200 --control $OUT/never-$seed.pt"
    done
}
for stage in ${STAGES:-jobs_pre jobs_counter jobs_stories}; do
    $stage | tr '\n' '\0' | xargs -0 -P "${LANES:-2}" -I{} bash -c "{}"
done
"$PYTHON" plot.py "$OUT" --evidence results/relearn --figures relearn
rm results/relearn/history.csv  # as in tracr/count and stories
"$PYTHON" plot.py results --markdown
