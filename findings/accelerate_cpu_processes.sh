#!/usr/bin/env bash
# accelerate 1.15.0: `accelerate launch --cpu --num_processes 2` starts one process on a machine without MPI. It exits
# with 0 and prints no warning, so a run that was meant to be shared between two processes does all the work in one.
#
# One would guess two, as with torchrun, or an error: the number was given on the command line, and gloo, which is part
# of torch, is enough for processes on CPUs.
#
# What helps: start them with torchrun. accelerate's Accelerator() in the script then finds both.
#
# Output seen:
#     accelerate 1.15.0
#     accelerate launch --cpu --num_processes 2: exit 0, processes that ran: 1
#     torchrun --nproc_per_node 2: exit 0, processes that ran: 2
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 accelerate==1.15.0 numpy==2.4.6

cd "$folder"
export HF_HOME="$folder/home" ACCELERATE_USE_CPU=true
cat > work.py <<'PYTHON'
from accelerate import Accelerator

accelerator = Accelerator()
print("process", accelerator.process_index, "of", accelerator.num_processes, flush=True)
PYTHON

count() { grep -c "^process " "$1" || true; }

venv/bin/python -c 'import accelerate; print("accelerate", accelerate.__version__)'
set +e
venv/bin/accelerate launch --cpu --num_processes 2 work.py > launch.txt 2>&1
launch=$?
venv/bin/torchrun --nproc_per_node 2 work.py > torchrun.txt 2>&1
torchrun=$?
set -e
echo "accelerate launch --cpu --num_processes 2: exit $launch, processes that ran: $(count launch.txt)"
echo "torchrun --nproc_per_node 2: exit $torchrun, processes that ran: $(count torchrun.txt)"
[ "$launch $(count launch.txt)" = "0 1" ]
[ "$torchrun $(count torchrun.txt)" = "0 2" ]
