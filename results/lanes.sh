# What the scripts beside it share: commands of this project, in lanes side by side, or printed.
#
#     DRY=1 bash results/pcfg.sh      # prints the commands, one a line, each below what it needs
#     LANES=8 PYTHON=path/to/python OUT=/elsewhere bash results/pcfg.sh
#     FLAGS="--steps 20 --eval-size 16" OUT=/tmp/x RESULTS=/tmp/y bash results/pcfg.sh  # rehearsal
#
# Restartable: training goes on where it was; an analysis is passed over if its file is younger than
# its checkpoint. Raw runs stand under OUT, tables and figures under RESULTS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON=${PYTHON:-python} OUT=${OUT:-out/evidence} RESULTS=${RESULTS:-results}
export DRY=${DRY:-} FLAGS=${FLAGS:-} LANES=${LANES:-2} THREADS=${THREADS:-1}

# evidence is made from a clean commit, which its records name; a rehearsal goes elsewhere
if [ ! "$DRY" ] && [ "$RESULTS" = results ] && ! git diff --quiet HEAD -- '*.py' setups; then
    echo "the code has changes that are not committed; for a rehearsal give RESULTS=/elsewhere" >&2
    exit 2
fi

run() {  # script and flags
    if [ "$DRY" ]; then echo python "$@"; else "$PYTHON" "$@"; fi
}
train() {  # run, script and flags
    run "${@:2}" --out "$OUT/$1.pt" --threads $THREADS $FLAGS
}
see() {  # run, one analysis and flags
    local file=$OUT/$1.$2.jsonl; [ "$2" != verdict ] || file=$OUT/$1.verdict.json
    [ "$file" -nt "$OUT/$1.pt" ] ||
        run analyze.py "${@:2}" --ckpt "$OUT/$1.pt" --threads $THREADS $FLAGS
}
look() {  # run, analyses that end in a verdict (none: all) and flags
    [ "$OUT/$1.verdict.json" -nt "$OUT/$1.pt" ] ||
        run analyze.py "${@:2}" --ckpt "$OUT/$1.pt" --threads $THREADS $FLAGS
}
export -f run train see look

stages() {  # names of functions that print a line of shell a job: their jobs, a stage at a time
    local stage lanes=$LANES; [ ! "$DRY" ] || lanes=1
    for stage; do
        "jobs_$stage" | tr '\n' '\0' | xargs -0 -n 1 -P "$lanes" bash -ec
    done
}
evidence() {  # set, its figures
    run results/evidence.py "$OUT/$1" "$RESULTS/$1" --figures "${@:2}"
}
