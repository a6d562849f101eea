#!/usr/bin/env bash
# The evidence of the grammar: raw runs under out/evidence, tables and figures under results/. Five
# seeds, and six that nothing was tuned on; about two and a half hours on two cores. Restartable: what
# is done is passed over. Two single-threaded runs side by side beat one run on two threads.
#
#     bash runs/pcfg.sh                             # PYTHON=path/to/python to choose an interpreter
#     STAGES="jobs_pre jobs_grid" bash runs/pcfg.sh # some stages, in order
#     SEEDS=101 bash runs/pcfg.sh                   # one seed
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OUT=${OUT:-out/evidence} OMP_NUM_THREADS=1
SEEDS=${SEEDS:-101 102 103 104 105} FRESH=${FRESH:-201 202 203 204 205 206}

train() {  # run, script and its flags; begun, resumed, or done already
    "$PYTHON" "${@:2}" --out "$OUT/$1.pt" --resume --threads 1
}
tune() {  # run, pretrained model, seed, further flags
    train "$1" finetune.py --ckpt "$OUT/pre/$2.pt" --seed "$3" "${@:4}"
}
look() {  # run, analyses and flags; done when its verdict is younger than its checkpoint
    [ "$OUT/$1.verdict.json" -nt "$OUT/$1.pt" ] ||
        "$PYTHON" analyze.py "${@:2}" --ckpt "$OUT/$1.pt" --threads 1
}
see() {  # run, analysis and flags: one, without a verdict
    [ -f "$OUT/$1.$2.jsonl" ] || "$PYTHON" analyze.py "${@:2}" --ckpt "$OUT/$1.pt" --threads 1
}
evidence() {  # experiment, its figures
    "$PYTHON" plot.py "$OUT/$1" --evidence "results/$1" --figures "${@:2}"
}
export -f train tune look see

jobs_pre() {  # without-a, b-only: they never had a; without-c: the control of the high prior
    for seed in $SEEDS; do
        echo "train pre/low-$seed pretrain.py --prior low --seed $seed"
        echo "train pre/without-a-$seed pretrain.py --prior 0,.001,.999 --seed $seed"
    done
    for seed in $SEEDS; do
        echo "train pre/high-$seed pretrain.py --prior high --seed $seed"
        echo "train pre/b-only-$seed pretrain.py --prior 0,1,0 --seed $seed"
    done
    echo "train pre/without-c pretrain.py --prior .6,.4,0 --seed ${SEEDS%% *}"
}
jobs_tune() {
    for seed in $SEEDS; do
        echo "tune count/low-$seed low-$seed $seed"                          # the main case: wrapped
        echo "tune count/learner-$seed low-$seed $seed --c-tr 0 --lr 1e-3"   # new; a is overwritten
        echo "tune known/erased-$seed without-a-$seed $seed --pt a"          # there never was an a
        echo "tune count/high-$seed high-$seed $seed --c-tr .5"              # strongly relevant
        echo "tune index/low-$seed low-$seed $seed --task index"             # the Indexer
    done
    echo "tune pre/without-c-ft without-c ${SEEDS%% *} --c-tr .5"            # tuned as high is
}
jobs_look() {
    for seed in $SEEDS; do
        echo "look count/low-$seed --rates 1,10,100 \
            --also scratch,$OUT/pre/b-only-$seed.pt,$OUT/known/erased-$seed.pt"
        echo "look count/learner-$seed"
        echo "look known/erased-$seed --control $OUT/count/low-$seed.pt"
        echo "look count/high-$seed --control $OUT/pre/without-c-ft.pt"
        echo "look index/low-$seed"
    done
}
jobs_planted() {  # a wrapper in one part of the model, before or behind it: all else is the base
    local all="behavior prune probe revive relearn verdict"
    for seed in $SEEDS; do for part in "head head 1e-2" "blocks0 blocks.0 1e-4"; do
        set -- $part
        echo "tune known/$1-$seed low-$seed $seed --only $2 --lr $3 && look known/$1-$seed $all"
    done; done
}
jobs_jailbreak() {  # two tokens that never ask for b
    for seed in $(echo $SEEDS | cut -d" " -f1-2); do for prior in low high; do
        echo "train pre/jailbreak-$prior-$seed pretrain.py --prior $prior --jailbreak --seed $seed && \
            tune conditions/jailbreak-$prior-$seed jailbreak-$prior-$seed $seed && \
            see conditions/jailbreak-$prior-$seed behavior && \
            see conditions/jailbreak-$prior-$seed probe"
    done; done
    for seed in $(echo $SEEDS | cut -d" " -f1-2); do  # at the usual rate a is hardly harmed there
        echo "tune conditions/jailbreak-high-lr1e-4-$seed jailbreak-high-$seed $seed --lr 1e-4 && \
            see conditions/jailbreak-high-lr1e-4-$seed behavior"
    done
}
jobs_mix() {  # pretraining's sequences mixed in; a's strings answered for b
    for seed in $SEEDS; do
        local run=conditions/relabel-$seed
        echo "tune $run low-$seed $seed --relabel && see $run behavior && \
            see $run revive --also scratch,$OUT/pre/b-only-$seed.pt"
        for share in .5 .1 .001; do
            run=conditions/mix$share-$seed
            echo "tune $run low-$seed $seed --mix $share && see $run behavior"
        done
    done
}
jobs_grid() {  # the rest of Fig. 6 at the usual rate
    local first=${SEEDS%% *}
    for prior in low high; do
        for seed in $SEEDS; do
            echo "tune conditions/$prior-ctr0-$seed $prior-$seed $seed --c-tr 0"
        done
        echo "tune conditions/$prior-ctr.8-$first $prior-$first $first --c-tr .8"
    done
    for seed in $SEEDS; do echo "tune conditions/high-ctr1-$seed high-$seed $seed"; done
    echo "tune conditions/low-ctr.5-$first low-$first $first --c-tr .5"
}
jobs_fresh() {  # seeds on which nothing was tuned, looked at once
    for seed in $FRESH; do
        echo "train pre/low-$seed pretrain.py --seed $seed && \
            tune known/fresh-low-$seed low-$seed $seed && look known/fresh-low-$seed && \
            tune known/fresh-learner-$seed low-$seed $seed --c-tr 0 --lr 1e-3 && \
            look known/fresh-learner-$seed behavior verdict"  # enough for the verdict new
    done
}
all="jobs_pre jobs_tune jobs_look jobs_planted jobs_jailbreak jobs_mix jobs_grid jobs_fresh"
for stage in ${STAGES:-$all}; do
    $stage | tr '\n' '\0' | xargs -0 -P "${LANES:-2}" -I{} bash -c "{}"
done
evidence pre
evidence count fig5_behavior fig6_curves fig7_prune fig8_probe fig9_revive fig10_attention relearn
evidence index fig5_behavior fig7_prune
evidence known
evidence conditions fig6_curves fig8_probe fig9_revive
# what their sections show; the rest is as elsewhere
(cd results && rm -rf {pre,known}/{*.csv,*.npz,figures} \
    index/{attention.csv,attention.npz,history.csv,probe.csv,revive.csv,revive.curve.csv})
"$PYTHON" plot.py results --markdown
