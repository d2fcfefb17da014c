#!/bin/bash
# Submits a chain of jobs from a login node: slurm/pipeline.sh PIPELINE.yaml [stages.rl.nodes=4]... [--dry-run | --status]
# Again: submits what is missing. Stages stand in the file; configs/pipelines/ holds the paper's.
set -euo pipefail
cd "$(dirname "$0")/.."
set -a   # sbatch reads account, partition and the like from the environment
# shellcheck source=/dev/null
if [ -f "${RLT_SITE:-slurm/site.env}" ]; then . "${RLT_SITE:-slurm/site.env}"; fi
set +a
# Not RLT_PROGRAM, which may be the container's: a login node needs the clone's own.
exec "${RLT_LOGIN_PROGRAM:-.venv/bin/megatron-rlt}" pipeline "$@"
