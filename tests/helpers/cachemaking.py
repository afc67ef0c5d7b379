"""Small caches from random teacher logits, written through the format package alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import logitcache
from logitcache.format.layout import Layout
from logitcache.format.manifest import TOKENIZER_DIRECTORY, Manifest
from logitcache.format.sequences import CachedSequence, TokenSequence
from logitcache.format.shards import ShardWriter, shard_name
from logitcache.format.tail_basis import TailBasis, write_tail_basis
from logitcache.format.tail_groups import write_tail_groups
from logitcache.format.tail_parts import TAIL_BASIS_NAME, TAIL_GROUPS_NAME, TailParts
from logitcache.format.targets import SparseTargets
from logitcache.format.tokenizer import save_tokenizer, tokenizer_fingerprint
from logitcache.storage.atomic import file_sha256
from logitcache.storage.folder import Folder
from tests.helpers.smallcaches import low_rank

if TYPE_CHECKING:  # tests of losses need no transformers, which takes seconds to import
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 64
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
"""Of a configuration of transformers: a student of any architecture, in milliseconds."""


def llama(vocab_size: int = VOCAB, hidden_size: int = 32, seed: int = 0, max_length: int = 64) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


def tokenizer(tokens: list[str] | None = None) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = tokens or ["<eos>", *(f"word{i}" for i in range(1, VOCAB))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[0])


def random_sequences(count: int, seed: int, longest: int = 24) -> list[TokenSequence]:
    """Sequences of different lengths, each with an untrained prompt."""
    random = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        length = int(random.integers(4, longest + 1))
        prompt = int(random.integers(1, length - 1))
        ids = random.integers(1, VOCAB, length).astype(np.int32)
        sequences.append(TokenSequence(ids, np.arange(length) >= prompt))
    return sequences


@torch.no_grad()
def teacher_logprobs(teacher: LlamaForCausalLM, sequence: TokenSequence | CachedSequence) -> torch.Tensor:
    """float64 [M, V] at the stored positions."""
    logits: torch.Tensor = teacher(torch.tensor(sequence.input_ids, dtype=torch.long)[None]).logits[0]
    return logits.double().log_softmax(-1)[torch.tensor(sequence.positions, dtype=torch.long)]


def sparse(logprobs: torch.Tensor, k: int, groups: np.ndarray | None, layout: Layout) -> SparseTargets:
    top, ids = logprobs.topk(k, dim=1)
    tail = logprobs.scatter(1, ids, -torch.inf)  # [M, V], −inf at the entries
    group_logprobs = None
    if groups is not None:
        by_group = [tail[:, torch.as_tensor(groups == g)].logsumexp(1) for g in range(groups.max() + 1)]
        group_logprobs = torch.stack(by_group, dim=1).float().numpy()
    share = tail.softmax(1)
    entropy = torch.where(share > 0, share * tail, 0.0).sum(1).float().numpy()
    sample_ids = sample_logprobs = None
    if layout.tail_parts.samples:
        samples = torch.multinomial(share, layout.tail_parts.samples, replacement=True)
        sample_ids, sample_logprobs = samples.int().numpy(), tail.gather(1, samples).float().numpy()
    return SparseTargets(
        ids.int().numpy(),
        top.float().numpy(),
        tail.logsumexp(1).float().numpy(),
        group_logprobs,
        {T: (tail / T).logsumexp(1).float().numpy() for T in layout.tail_parts.temperatures},
        entropy if layout.tail_parts.entropy else None,
        sample_ids,
        sample_logprobs,
    )


def write_cache(
    path: Path,
    sequences: list[TokenSequence],
    *,
    teacher: LlamaForCausalLM | None = None,
    k: int = 8,
    groups: np.ndarray | None = None,
    temperatures: tuple[float, ...] = (),
    tail_entropy: bool = False,
    num_tail_samples: int = 0,
    tail_basis: TailBasis | None = None,
    num_probes: int = 2,
    precision: str = "exact",
    teacher_tokenizer: PreTrainedTokenizerFast | None = None,
) -> logitcache.LogitCache:
    """A finished cache of `sequences`. groups: tail group of each id, int [V].  num_probes: beside a basis."""
    teacher = teacher or llama()
    num_groups = 0 if groups is None else int(groups.max()) + 1
    layout = Layout(
        VOCAB,
        TailParts(
            groups=num_groups,
            temperatures=temperatures,
            entropy=tail_entropy,
            samples=num_tail_samples,
            rank=tail_basis.rank if tail_basis else 0,
            probes=num_probes if tail_basis else 0,
        ),
        precision=precision,
    )
    if tail_basis:
        layout = layout.with_coefficient_step(tail_basis.step)
    with ShardWriter(Folder(path), shard_name(0, 1), layout) as writer:
        for sequence in sequences:
            logprobs = teacher_logprobs(teacher, sequence)
            targets = sparse(logprobs, k, groups, layout)
            if tail_basis:
                of_basis: dict[str, Any] = {**low_rank(logprobs.numpy(), layout, sequence, tail_basis)}
                targets = replace(targets, **of_basis)
            writer.write(sequence, targets)
    files = {}
    if tail_basis:
        write_tail_basis(Folder(path), tail_basis)
        files[TAIL_BASIS_NAME] = file_sha256(path / TAIL_BASIS_NAME)
    if groups is not None:
        write_tail_groups(Folder(path), groups)
        files[TAIL_GROUPS_NAME] = file_sha256(path / TAIL_GROUPS_NAME)
    teacher_tokenizer = teacher_tokenizer or tokenizer()
    save_tokenizer(Folder(path), teacher_tokenizer)
    saved = sorted((path / TOKENIZER_DIRECTORY).iterdir())
    files |= {f"{TOKENIZER_DIRECTORY}/{file.name}": file_sha256(file) for file in saved}
    fingerprint = {"teacher": {"name": "random"}, "tokenizer": tokenizer_fingerprint(teacher_tokenizer)}
    Manifest(layout, fingerprint, (writer.info,), {}, "tests", files).write(Folder(path))
    return logitcache.open(path)
