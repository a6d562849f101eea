#!/usr/bin/env bash
# The evidence of the grammar, five seeds, and six on which nothing was tuned: about two and a half
# hours on two cores (two single-threaded runs side by side beat one run on two threads).
#
#     bash results/pcfg.sh                     # how to print, shorten or move it: results/lanes.sh
#     STAGES="pre grid" bash results/pcfg.sh   # some stages, in order
#     SEEDS=101 bash results/pcfg.sh           # one seed
. "$(dirname "$0")/lanes.sh"
SEEDS=${SEEDS:-101 102 103 104 105} FRESH=${FRESH:-201 202 203 204 205 206}
FIRST=${SEEDS%% *} TWO=$(echo $SEEDS | cut -d" " -f1-2)

tune() {  # run, pretrained model, seed, further flags
    train "$1" finetune.py --ckpt "$OUT/pre/$2.pt" --seed "$3" "${@:4}"
}
export -f tune

jobs_pre() {  # without-a, b-only: they never had a; without-c: the control of the high prior
    for seed in $SEEDS; do
        echo "train pre/low-$seed pretrain.py --prior low --seed $seed"
        echo "train pre/without-a-$seed pretrain.py --prior 0,.001,.999 --seed $seed"
    done
    for seed in $SEEDS; do
        echo "train pre/high-$seed pretrain.py --prior high --seed $seed"
        echo "train pre/b-only-$seed pretrain.py --prior 0,1,0 --seed $seed"
    done
    echo "train pre/without-c pretrain.py --prior .6,.4,0 --seed $FIRST"
}
jobs_tune() {
    for seed in $SEEDS; do
        echo "tune count/low-$seed low-$seed $seed"                         # the main case: wrapped
        echo "tune count/learner-$seed low-$seed $seed --c-tr 0 --lr 1e-3"  # new; a is overwritten
        echo "tune known/erased-$seed without-a-$seed $seed --pt a"         # there never was an a
        echo "tune count/high-$seed high-$seed $seed --c-tr .5"             # strongly relevant
        echo "tune index/low-$seed low-$seed $seed --task index"            # the Indexer
    done
    echo "tune pre/without-c-ft without-c $FIRST --c-tr .5"                 # tuned as high is
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
jobs_planted() {  # a wrapper in one part of the model, before or behind a; all else is the base
    for seed in $SEEDS; do
        for part in "head head 1e-2" "blocks0 blocks.0 1e-4"; do
            set -- $part
            echo "tune known/$1-$seed low-$seed $seed --only $2 --lr $3 && \
look known/$1-$seed behavior prune probe revive relearn hybrids probe_apart revive_rates verdict"
        done
    done
}
jobs_jailbreak() {  # two tokens that never ask for b
    for seed in $TWO; do
        for prior in low high; do
            base=jailbreak-$prior-$seed run=conditions/jailbreak-$prior-$seed
            echo "train pre/$base pretrain.py --prior $prior --jailbreak --seed $seed && \
tune $run $base $seed && see $run behavior && see $run probe"
        done
    done
    for seed in $TWO; do  # at the usual rate a is hardly harmed there
        run=conditions/jailbreak-high-lr1e-4-$seed
        echo "tune $run jailbreak-high-$seed $seed --lr 1e-4 && see $run behavior"
    done
}
jobs_mix() {  # strings of a answered for b; pretraining's sequences mixed in
    for seed in $SEEDS; do
        run=conditions/relabel-$seed
        echo "tune $run low-$seed $seed --relabel && see $run behavior && \
see $run revive --also scratch,$OUT/pre/b-only-$seed.pt"
        for mix in .5 .1 .001; do
            run=conditions/mix$mix-$seed
            echo "tune $run low-$seed $seed --mix $mix && see $run behavior"
        done
    done
}
jobs_grid() {  # the rest of Fig. 6 at the usual rate
    for prior in low high; do
        for seed in $SEEDS; do
            echo "tune conditions/$prior-ctr0-$seed $prior-$seed $seed --c-tr 0"
        done
        echo "tune conditions/$prior-ctr.8-$FIRST $prior-$FIRST $FIRST --c-tr .8"
    done
    for seed in $SEEDS; do echo "tune conditions/high-ctr1-$seed high-$seed $seed"; done
    echo "tune conditions/low-ctr.5-$FIRST low-$FIRST $FIRST --c-tr .5"
}
jobs_fresh() {  # behavior is enough for the verdict `new`
    for seed in $FRESH; do
        echo "train pre/low-$seed pretrain.py --seed $seed && \
tune known/fresh-low-$seed low-$seed $seed && look known/fresh-low-$seed && \
tune known/fresh-learner-$seed low-$seed $seed --c-tr 0 --lr 1e-3 && \
look known/fresh-learner-$seed behavior verdict"
    done
}
stages ${STAGES:-pre tune look planted jailbreak mix grid fresh}
evidence pre
evidence count fig5_behavior fig6_curves fig7_prune fig8_probe fig9_revive fig10_attention relearn
evidence index fig5_behavior fig7_prune
evidence known
evidence conditions fig6_curves fig8_probe fig9_revive
run results/evidence.py
