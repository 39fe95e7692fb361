# shellcheck shell=bash disable=SC2034 # the scripts of this folder read what is set here
# What the scripts must know of your cluster: copy this file to slurm/site.sh, which git ignores, and edit it. Enter
# `. slurm/site.sh` before sbatch, which reads its SBATCH_ variables alone; pipeline.sh does that itself.

# How sbatch asks. Any of its variables will do (man sbatch, INPUT ENVIRONMENT VARIABLES); one set before wins.
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-my_account}
export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}
export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-24:00:00} # at most the partition's: jobs are requeued and continue
export GPUS_PER_NODE=${GPUS_PER_NODE:-4}             # 0 = nodes without
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-$GPUS_PER_NODE} # or, on older clusters: export SBATCH_GRES=gpu:a100:4
export SBATCH_CPUS_PER_GPU=${SBATCH_CPUS_PER_GPU:-8} # or whole nodes: export SBATCH_EXCLUSIVE=
# export SBATCH_MEM_PER_NODE=0                       # all memory of a node, where the default is little
# export SBATCH_QOS=normal SBATCH_CONSTRAINT=a100

# Name of the GPUs as in train/gpus.py: pipeline.sh then checks memory before it submits.
GPU=${GPU:-a100}

# The environment in which `python -m train` works, entered at the start of every job.
setup() {
  # module load python/3.11 cuda/12.4
  # . ~/venvs/crossdiff/bin/activate
  : # nothing: .venv of this folder if it is there, else python3
}
# Or a container, in front of every python:
# CONTAINER=(apptainer exec --nv --bind /data crossdiff.sif) PYTHON=python3

# Shards that training reads are copied to this disk of the node when they are first needed. Empty = read where they are.
# STAGING=/local/scratch/$USER

# Network interface of the nodes' fast network, if processes on several nodes do not find each other; a suffix of the
# first node's name on it, such as i or -ib0, where names have one.
# INTERFACE=ib0
# HEAD_SUFFIX=-ib0

# W&B: online needs internet on the nodes; offline writes files for `wandb sync`; disabled.
export WANDB_MODE=${WANDB_MODE:-offline}

# Nodes without internet read models and datasets from the cache that `bash slurm/tokens.sh` and a first load filled.
# export HF_HOME=/data/huggingface HF_HUB_OFFLINE=1

# Options for jobs of pipeline.sh: for all, and for each stage.
# SBATCH_ARGS="--mail-type=FAIL"  TOKENS_ARGS="--partition=cpu --cpus-per-task=4"  TRAIN_ARGS="--time=48:00:00"
EXTRACT_TASKS=${EXTRACT_TASKS:-4} # nodes that extract at the same time
TRAIN_NODES=${TRAIN_NODES:-1}     # nodes that train one crosscoder
# Processes on a node, where it is not to be one for each GPU: on nodes without GPUs several divide the CPUs.
# export RANKS_PER_NODE=4
# More options for srun: SRUN_ARGS=(--cpu-bind=none)
