#!/usr/bin/env bash
# The league of instruments: models whose truth is certified, deletions, and every instrument on
# each of them; results/league.py has the list.
#
#     bash results/league.sh            # ten seeds; how to shorten or move it: results/lanes.sh
#     bash results/league.sh jobs       # prints the commands, one a line, for a cluster
#     SEEDS=0 bash results/league.sh    # one
[ "${1:-}" != jobs ] || DRY=1
. "$(dirname "$0")/lanes.sh"
SEEDS=${SEEDS:-301 302 303 304 305 306 307 308 309 310}
METHODS=${METHODS-$(echo $SEEDS | cut -d' ' -f 1-3)}  # seeds whose deletions are made and audited

audit() {  # run: passed over if it was audited after it was made
    [ "$OUT/$1.league.json" -nt "$OUT/$1.pt" ] ||
        run results/league.py audit "$OUT/$1.pt" --threads $THREADS $FLAGS
}
export -f audit

for stage in 0 1 2 3 audit; do
    eval "jobs_$stage() { \$PYTHON results/league.py jobs $stage \"\$SEEDS\" \"\$METHODS\"; }"
done
stages ${STAGES:-0 1 2 3 audit}
run results/league.py collect "$OUT/league"
run results/league.py table
