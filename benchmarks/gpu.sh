#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under ten minutes: builds, tests, verifies, measures, writes JSON.
#
#     benchmarks/gpu.sh [PYTHON]
#
# PYTHON is an interpreter with a CUDA build of torch, and with triton, transformers, pytest, hypothesis, typer and rich (default:
# python3). The numbers go to benchmarks/results/<gpu>.json.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-python3}"
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

"$python" -c 'import torch; assert torch.cuda.is_available(), "this torch sees no GPU"; print(torch.cuda.get_device_name())'
"$python" setup.py -q build_ext --inplace
"$python" -m bigmodel_kernels.cli doctor
# A step that fails is named at the end; the others still run, because a GPU is seldom at hand.
failed=()
timeout 240 "$python" -m pytest -q tests/gpu || failed+=(kernels)
timeout 180 "$python" -m pytest -q tests/ops/test_*_triton.py || failed+=(tests)
timeout 150 "$python" -m bigmodel_kernels.cli verify --device cuda --json build/verify-gpu.json || failed+=(verify)
timeout 240 "$python" -m bigmodel_kernels.cli bench --device cuda --budget 0.5 --save || failed+=(bench)
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
