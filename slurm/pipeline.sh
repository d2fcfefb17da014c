#!/bin/bash
# Submits a chain of jobs from a login node: slurm/pipeline.sh PIPELINE.yaml [stages.rl.nodes=4]... [--dry-run | --status]
# Again: submits what is missing. Stages stand in the file; configs/pipelines/ holds the paper's.
set -euo pipefail
cd "$(dirname "$0")/.."
set -a   # sbatch reads account, partition and the like from the environment
if [ -n "${RLT_SITE:-}" ] && [ ! -r "$RLT_SITE" ]; then
    echo "megatron-rlt: error: RLT_SITE=$RLT_SITE: no such file; correct it, or leave it out" >&2
    exit 2
fi
# shellcheck source=/dev/null
if [ -f "${RLT_SITE:-slurm/site.env}" ]; then . "${RLT_SITE:-slurm/site.env}"; fi
set +a
# Not RLT_PROGRAM, which may be the container's: a login node needs the clone's own.
exec "${RLT_LOGIN_PROGRAM:-.venv/bin/megatron-rlt}" pipeline "$@"
