#!/usr/bin/env bash
#SBATCH --job-name=tokens
#SBATCH --nodes=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
# Documents -> token shards: sbatch slurm/tokens.sh [experiment=STUDY] [key=value ...]
# One process, no GPU; to ask for none where slurm/site.sh does: env -u SBATCH_GPUS_PER_NODE -u SBATCH_CPUS_PER_GPU sbatch ...
# It downloads datasets and tokenizers that are not in the cache yet: where nodes have no internet, run it where there is
# some, `bash slurm/tokens.sh`.

here=$(dirname -- "$0")
[ -f "$here/common.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/slurm # Slurm runs a copy of this file
[ -f "$here/common.sh" ] || { echo "error: submit from the root of crossdiff: cd FOLDER && sbatch slurm/tokens.sh"; exit 2; }
# shellcheck source=slurm/common.sh
. "$here/common.sh"

prepare tokens.sh one "$@"
arguments_of gemma2_9b "$@"
run "${python[@]}" -m extract.tokens "${arguments[@]}"
