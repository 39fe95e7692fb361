#!/usr/bin/env bash
#SBATCH --job-name=extract
#SBATCH --nodes=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --array=0-3
#SBATCH --output=%x-%A_%a.log
# Token shards -> activation shards of every model: sbatch [--array=0-15] slurm/extract.sh [experiment=STUDY] [key=value ...]
# An array of any size, one process for each GPU: they share the shards of all models out among themselves, and take over
# those of one that dies. Tasks may be cancelled, requeued and added at any time; the last one completes the store.

here=$(dirname -- "$0")
[ -f "$here/common.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/slurm # Slurm runs a copy of this file
[ -f "$here/common.sh" ] || { echo "error: submit from the root of crossdiff: cd FOLDER && sbatch slurm/extract.sh"; exit 2; }
# shellcheck source=slurm/common.sh
. "$here/common.sh"

prepare extract.sh workers "$@"
arguments_of gemma2_9b "$@"
run "${python[@]}" -m extract.activations "${arguments[@]}"
