#!/bin/bash
# A 42 GB student written by four tasks on two nodes, into storage that all of them see (Lustre, GPFS, one node's disk).
# Each task writes its share of the tensors; when all are there, the first one checks and publishes. If a task ends early,
# the job ends; submitted again with --resume, it goes on where it stopped.
#
#   sbatch slurm.sh
#
# The same without Slurm, on one machine:
#
#   torchrun --nproc-per-node 4 -m hxaconv init-from-teacher TEACHER OUT
#
#SBATCH --job-name=hxaconv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=01:00:00

set -euo pipefail
teacher=${TEACHER:-RekaAI/reka-flash-3}
out=${OUT:?set OUT to a folder on storage that all tasks see}

# srun says which task each one is. They meet at the first node; MASTER_ADDR and MASTER_PORT name another place.
srun --kill-on-bad-exit=1 hxaconv init-from-teacher "$teacher" "$out" --layer-map reka-flash-3 "$@"
