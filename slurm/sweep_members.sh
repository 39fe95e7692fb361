#!/usr/bin/env bash
# Members of a sweep that train together on one node, with one reader (sweep.share_reader=true); hydra/launcher=slurm
# submits it with the records of the members, OUTPUTS/sweeps/NAME.json.

# shellcheck source=slurm/common.sh
. "$(dirname -- "$0")/common.sh" || exit 2

prepare sweep_members.sh one "$@"
threads="" # members divide the CPUs of the node themselves
run "${python[@]}" -m train.sweep_members "$@"
