"""Detached signatures by OpenSSH: the documented commands, run as a user would. No code of ours runs them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from logitcache.cli import main
from logitcache.format.manifest import MANIFEST_NAME, SIGNATURE_NAME
from tests.helpers.smallcaches import EVERYTHING, random_rows, write_cache

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")

SIGN = "ssh-keygen -Y sign -n logitcache -f {key} {cache}/logitcache.json"
VERIFY = (
    "ssh-keygen -Y verify -n logitcache -f {allowed} -I alice@example.org -s {cache}/logitcache.json.sig "
    "< {cache}/logitcache.json"
)


class Signing:
    """A signed cache, its maker's key and who trusts it."""

    def __init__(self, root: Path) -> None:
        self.paths = {"key": root / "key", "cache": root / "cache", "allowed": root / "allowed_signers"}
        write_cache(self.cache, random_rows(4, EVERYTHING), EVERYTHING)
        make_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(self.paths["key"])]
        subprocess.run(make_key, check=True)
        public = self.paths["key"].with_suffix(".pub").read_text()
        self.paths["allowed"].write_text(f'alice@example.org namespaces="logitcache" {public}')
        assert self.run(SIGN).returncode == 0

    @property
    def cache(self) -> Path:
        return self.paths["cache"]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command.format(**self.paths), shell=True, capture_output=True, text=True)


@pytest.fixture
def signing(tmp_path: Path) -> Signing:
    return Signing(tmp_path)


@pytest.mark.slow
def test_a_signature_lies_beside_the_manifest_and_is_verified(signing: Signing) -> None:
    assert (signing.cache / SIGNATURE_NAME).is_file()
    done = signing.run(VERIFY)
    assert done.returncode == 0
    assert 'Good "logitcache" signature for alice@example.org' in done.stdout


def test_a_signed_cache_is_a_good_cache(signing: Signing) -> None:
    assert main(["verify", str(signing.cache)]) == 0


def test_an_altered_manifest_is_not_what_was_signed(signing: Signing) -> None:
    manifest = signing.cache / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace('"skipped"', '"skipped" '))
    assert signing.run(VERIFY).returncode != 0


def test_the_signature_of_somebody_else_is_refused(signing: Signing, tmp_path: Path) -> None:
    (signing.cache / SIGNATURE_NAME).unlink()
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    signing.paths["key"] = other
    assert signing.run(SIGN).returncode == 0
    assert signing.run(VERIFY).returncode != 0


def test_a_signature_made_for_another_purpose_is_refused(signing: Signing) -> None:
    (signing.cache / SIGNATURE_NAME).unlink()
    assert signing.run(SIGN.replace("-n logitcache", "-n email")).returncode == 0
    assert signing.run(VERIFY).returncode != 0
