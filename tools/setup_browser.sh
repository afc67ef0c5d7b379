#!/usr/bin/env bash
# The browser that the tests of `logitcache view` drive: Chromium or Chrome of the system, installed where that is possible.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "setup: installing Chromium for the tests of the page"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null
else
  echo "setup: no Chromium here, the tests that drive a browser are skipped; install it to run them" >&2
fi
