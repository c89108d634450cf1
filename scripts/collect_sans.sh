#!/usr/bin/env bash
# Episodes of every scripted task, then their cards and montages (docs/data.md).
#   scripts/collect_sans.sh [EPISODES a task] [FOLDER]       safe to stop and start again
# One to three CPU seconds an episode of 72 actions on a software renderer, more for longer ones.
set -euo pipefail
episodes=${1:-16}
folder=${2:-runs/data}
export OMP_NUM_THREADS=1 LP_NUM_THREADS=1
tasks=(PushCube PullCube StackCube LiftPegUpright PokeCube PickCube PlaceSphere PullCubeTool
       DrawTriangle StackPyramid PegInsertionSide)
sets=()
for task in "${tasks[@]}"; do
  out="$folder/sans-${task,,}"
  worldloop collect --env "$task-v1" --out "$out" --episodes "$episodes" --shard 4 --seed 100
  sets+=("$out")
done
worldloop data stats "${sets[@]}" --json "$folder/data.json" --montages "$folder/montages"
