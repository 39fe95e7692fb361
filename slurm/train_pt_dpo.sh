#!/usr/bin/env bash
#SBATCH --job-name=train_pt_dpo
#SBATCH --nodes=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
# Train the crosscoder of gemma2_9b/pt_dpo, or continue it: sbatch [--nodes=2] slurm/train_pt_dpo.sh [key=value ...]

# shellcheck disable=SC2034 # train.sh reads it
default_pair=gemma2_9b/pt_dpo
here=$(dirname -- "$0")
[ -f "$here/common.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/slurm # Slurm runs a copy of this file
[ -f "$here/common.sh" ] || { echo "error: submit from the root of crossdiff: cd FOLDER && sbatch slurm/train_pt_dpo.sh"; exit 2; }
# shellcheck source=slurm/train.sh
. "$here/train.sh"
