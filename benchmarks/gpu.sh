#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under ten minutes: builds, tests, verifies, measures, writes JSON.
#
#     benchmarks/gpu.sh [--dry-run] [PYTHON]
#
# PYTHON is an interpreter with a CUDA build of torch, and with triton, transformers, pytest, hypothesis, typer and rich (default:
# python3); with pytest-xdist the tests share the processors, and with compute-sanitizer on PATH a few of them run under memcheck. The
# numbers go to benchmarks/results/<gpu>.json, and the choice between products to cuda_choice.json.
#
# --dry-run prints every step and checks what can be checked with no GPU: that the modules are there, the kernels compile, the tests
# are collected and the commands take their options. It measures nothing and writes no result.
set -euo pipefail
cd "$(dirname "$0")/.."
dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
python="${1:-python3}"
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=()

# step NAME SECONDS CHECK COMMAND...: a step that fails is named at the end, and the others still run, because a GPU is seldom at hand.
# A dry run prints the command, and runs it with the option CHECK added.
step() {
  local name="$1" seconds="$2" check="$3"
  shift 3
  if [ -z "$dry" ]; then
    timeout --signal=INT --kill-after=20 "$seconds" "$@" || failed+=("$name")
    return
  fi
  echo "$name, at most $seconds s: $*"
  local output
  if output=$("$@" "$check" 2>&1); then
    echo "    checked with $check"
  else
    echo "    FAILED with $check:"
    tail -n 15 <<<"$output" | sed 's/^/    /'
    failed+=("$name")
  fi
}

if [ -z "$dry" ]; then
  "$python" -c 'import torch; assert torch.cuda.is_available(), "this torch sees no GPU"; print(torch.cuda.get_device_name())'
  "$python" setup.py -q build_ext --inplace
else
  "$python" -c 'import torch, triton, transformers, pytest, hypothesis, typer, rich' || failed+=(modules)
  echo "build, into the package: $python setup.py -q build_ext --inplace"
  if ! command -v "${NVCC:-nvcc}" >/dev/null; then
    echo "    no nvcc: not checked that the kernels compile"
  elif output=$("$python" csrc/build.py cuda 2>&1); then
    echo "    checked: every kernel compiles, into build/cuda"
  else
    echo "    FAILED:"
    tail -n 15 <<<"$output" | sed 's/^/    /'
    failed+=(build)
  fi
fi
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))"); fi
step doctor 60 --help "$python" -m bigmodel_kernels.cli doctor
step kernels 180 --collect-only "$python" -m pytest -q tests/gpu -k "not emulator_says" "${workers[@]}"
step words 120 --collect-only "$python" -m pytest -q tests/gpu -k emulator_says
if command -v compute-sanitizer >/dev/null || [ -n "$dry" ]; then
  memcheck=(compute-sanitizer --tool memcheck --error-exitcode 9)
  [ -n "$dry" ] && memcheck=()
  step memcheck 90 --collect-only "${memcheck[@]}" "$python" -m pytest -q tests/gpu -k "features and (window or packed) or several or graph"
fi
step linear 120 --help "$python" -m bigmodel_kernels.ops.linear.cuda_choice
step bench 240 --help "$python" -m bigmodel_kernels.cli bench --device cuda --budget 0.2 --save
if [ -n "$dry" ]; then export TRITON_INTERPRET=1; fi # with neither a GPU nor the interpreter there is nothing to collect
triton=(tests/ops/test_{attention,attention_backward,attention_decode,cross_entropy,embedding,feed_forward,linear,norm,philox,rotary}_triton.py)
step tests 240 --collect-only "$python" -m pytest -q "${triton[@]}" "${workers[@]}"
step verify 150 --help "$python" -m bigmodel_kernels.cli verify --device cuda --json build/verify-gpu.json
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
if [ -n "$dry" ]; then echo "all that needs no GPU is in order"; fi
