#!/bin/bash
# A 42 GB student written by four array tasks on shared storage. Each takes the shards of its part; the last
# to finish publishes. A task that fails is started again with the same line and --part i/4 (its number), and goes
# on where it stopped; if all tasks have ended and OUT is still called OUT.partial-..., `hxaconv finish OUT` publishes it.
#
#   sbatch slurm.sh
#
# The same under torchrun, one process per part:
#
#   torchrun --nproc-per-node 4 --no-python hxaconv init-from-teacher TEACHER OUT
#
# An array whose tasks convert different models adds --part 1/1: each task writes the whole of its own.
#
#SBATCH --job-name=hxaconv
#SBATCH --array=1-4
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --time=01:00:00

set -euo pipefail
teacher=${TEACHER:-RekaAI/reka-flash-3}
out=${OUT:?set OUT to a folder on storage that all tasks see}

# SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT say which part this is; no option is needed.
hxaconv init-from-teacher "$teacher" "$out" --layer-map reka-flash-3 --max-shard-size 5GB
