#!/usr/bin/env bash
# What a new user does first, with an installed wheel and no checkout: run it in an empty folder,
# `rlhf-exp` in the PATH. docs/how-to/install.md shows what it prints.
set -euo pipefail
show() {
  echo "\$ $*"
  "$@"
  echo
}

show rlhf-exp --version
show rlhf-exp run --help ppo.kl
show rlhf-exp run experiment=smoke name=first "$@"
show rlhf-exp run -m experiment=smoke name=pair ppo.lr=1e-4,3e-4 "$@"
show rlhf-exp status pair
show rlhf-exp report first
show rlhf-exp report pair
# On a login node the same command without plan=true submits the jobs.
show rlhf-exp run -m experiment=smoke name=cluster hydra/launcher=slurm ppo.lr=1e-4,3e-4 plan=true
echo "all steps done"
