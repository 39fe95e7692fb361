#!/usr/bin/env bash
#SBATCH --job-name=analysis
#SBATCH --nodes=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
# Latents, labels, comparison and report of all crosscoders of a study: sbatch slurm/analysis.sh [experiment=STUDY] [key=value ...]
# One process, on one GPU where it has any: sbatch --gpus-per-node=1 is enough. What is up to date is not done again.

here=$(dirname -- "$0")
[ -f "$here/common.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/slurm # Slurm runs a copy of this file
[ -f "$here/common.sh" ] || { echo "error: submit from the root of crossdiff: cd FOLDER && sbatch slurm/analysis.sh"; exit 2; }
# shellcheck source=slurm/common.sh
. "$here/common.sh"

prepare analysis.sh one "$@"
arguments_of gemma2_9b "$@"
run "${python[@]}" -m analysis "${arguments[@]}"
