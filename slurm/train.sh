#!/usr/bin/env bash
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
# Train one crosscoder, or continue it: sbatch [--nodes=2] slurm/train.sh experiment=STUDY/PAIR [key=value ...]
# One process for each GPU of all nodes; several divide the latents (engine=latent) unless engine= says otherwise.

here=$(dirname -- "$0")
[ -f "$here/common.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/slurm # Slurm runs a copy of this file
[ -f "$here/common.sh" ] || { echo "error: submit from the root of crossdiff: cd FOLDER && sbatch slurm/train.sh"; exit 2; }
# shellcheck source=slurm/common.sh
. "$here/common.sh"

label=train${default_pair:+_${default_pair#*/}}.sh
prepare "$label" ranks "$@"
arguments_of "${default_pair:-}" "$@"
num_ranks=$((nodes * per_node))
[ "$num_ranks" -eq 1 ] || has engine "${arguments[@]}" || arguments+=(engine=latent)
[ -z "${STAGING:-}" ] || has data.staging "${arguments[@]}" || arguments+=("data.staging=$STAGING")
limits=("gpus=$num_ranks" "gpus_per_node=$per_node")
if in_slurm && limit=$(squeue --noheader --jobs="$this_job" --format=%l) && [ -n "$limit" ]; then
  limits+=("walltime=$limit") # not checked where Slurm does not answer
fi
"${python[@]}" -m train.preflight "${arguments[@]}" "${limits[@]}" >/dev/null || ended $?
run "${python[@]}" -m train "${arguments[@]}"
