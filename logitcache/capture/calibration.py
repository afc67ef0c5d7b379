"""The tail groups and the tail basis of a cache, made from the teacher's distributions at some of its first positions.

Groups are clusters of tokens that the teacher makes probable in the same places. Within a group the loss lets the student
keep its own shape, so a group costs nothing if the teacher's and the student's log-probabilities of its tokens rise and fall
together from position to position. A few dozen positions show which tokens rise and fall together for the teacher:
`tools/bench_fidelity.py` compares these groups with bands of mean probability.

The basis is of the directions in which the teacher's logits vary most from position to position, by their weighted
covariance. No [positions, V] and no [V, V] is needed: the teacher multiplies the covariance with a block of directions
while it scores, and a few such products span a space (block Lanczos) that holds nearly all of what the best directions would.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from logitcache.capture.teachers.base import LogitTeacher
from logitcache.errors import UserError
from logitcache.format.quantization import FINEST_COEFFICIENT_BITS
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_basis import TailBasis, centred

CALIBRATION_SEQUENCES = 256
"""Sequences at the beginning of a corpus that tail groups and tail basis are made from; more for a basis, if they are short."""
CALIBRATION_POSITIONS = 64
"""Stored positions whose distributions are compared; 24 do nearly as well."""
HEAD_ENTRIES = 16
"""Tokens of a position that are taken to be entries, which no group needs to describe."""
ITERATIONS = 25
LEAST_LOGPROB = -80.0
"""The least log-probability of a token, banned ones too, so that distances stay finite."""

LEAST_POSITIONS_PER_DIRECTION = 2
POSITIONS_PER_DIRECTION = 64
"""On other texts of the demo's teacher, 64 directions leave 3 % more of the variance than with 256; with 16, 12 % more."""
LEAST_SEQUENCES = 32
"""Sequences that the positions of a basis come from, if there are as many."""
PRODUCTS = 4
OVERSAMPLING = 16
"""Directions of a block beyond those that are wanted."""
NEGLIGIBLE = 1e-7
"""A variance is nothing if it is this share of the largest one: float32 sums say no more."""
INNER_ROWS = 1 << 14
HALF_LIMIT = 60_000.0
"""Numbers beyond it do not fit in half precision."""

logger = logging.getLogger("logitcache")


def calibration_sequences(corpus: Iterable[TokenSequence], rank: int) -> list[TokenSequence]:
    """Returns the first sequences of a corpus that is long enough for a basis of this rank, whatever the size of its shards."""
    first: list[TokenSequence] = []
    num_positions = 0
    for sequence in corpus:
        first.append(sequence)
        num_positions += len(sequence.positions)
        if len(first) >= CALIBRATION_SEQUENCES and num_positions >= POSITIONS_PER_DIRECTION * rank:
            break
    return first


def make_tail_groups(teacher: LogitTeacher, sequences: Sequence[TokenSequence], num_groups: int) -> np.ndarray:
    """Returns the group of each id, int32 [V], by the teacher's distributions at stored positions drawn at random.

    Raises UserError if the teacher gives no numbers.
    """
    with np.errstate(divide="ignore"):
        logprobs = [np.log(teacher.mean_probability([one])) for one in _single_positions(sequences)]
    numbers = [one for one in logprobs if not np.isnan(one).any()]  # a row that gives none is refused when it is scored
    if not numbers:
        raise UserError("the teacher gives no log-probabilities that are numbers: try another --dtype")
    return profile_clusters(np.stack(numbers).astype(np.float32), num_groups)


def _single_positions(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Returns beginnings of sequences of which only the last position is stored."""
    owners = np.repeat(np.arange(len(sequences)), [len(sequence.positions) for sequence in sequences])
    positions = np.concatenate([sequence.positions for sequence in sequences])
    single = []
    for drawn in np.random.default_rng(0).permutation(len(owners))[:CALIBRATION_POSITIONS]:
        length = int(positions[drawn]) + 2
        single.append(TokenSequence(sequences[owners[drawn]].input_ids[:length], np.arange(length) == length - 1))
    return single


def profile_clusters(logprobs: np.ndarray, num_groups: int) -> np.ndarray:
    """Returns the cluster of each token, int32 [V], by a weighted k-means; cluster 0 has the most probable tokens.

    logprobs: the teacher's full distributions at C positions, float [C, V]. A token is the point of its log-probabilities
    there, its weight the square root of its mean probability outside the head. Each of the num_groups ≤ V clusters has at least
    one id. Lloyd 1982, doi 10.1109/TIT.1982.1056489.
    """
    vocab_size = logprobs.shape[1]
    assert num_groups <= vocab_size, f"{num_groups} groups of {vocab_size} tokens"
    points = np.maximum(logprobs.T, LEAST_LOGPROB).astype(np.float32)  # [V, C]
    probabilities = np.exp(logprobs, dtype=np.float64)
    mean = probabilities.mean(axis=0)
    head = np.argpartition(-logprobs, min(HEAD_ENTRIES, vocab_size - 1), axis=1)[:, :HEAD_ENTRIES]
    np.put_along_axis(probabilities, head, 0.0, axis=1)
    weights = np.sqrt(probabilities.mean(axis=0) + np.finfo(np.float32).tiny)

    drawn = np.random.default_rng(0).choice(vocab_size, num_groups, replace=False, p=weights / weights.sum())
    centres = points[drawn]
    for _ in range(ITERATIONS):
        distances = _distances(points, centres)
        groups = distances.argmin(axis=1)
        _fill_empty(groups, weights * distances.min(axis=1), num_groups)
        memberships = (groups == np.arange(num_groups)[:, None]) * weights.astype(np.float32)  # [G, V]
        centres = memberships @ points / memberships.sum(axis=1, keepdims=True)
    order = np.argsort(-np.bincount(groups, mean, num_groups), kind="stable")
    by_size: np.ndarray = np.argsort(order).astype(np.int32)[groups]
    return by_size


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Returns squared Euclidean distances, float32 [V, G]."""
    squares = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)
    distances: np.ndarray = np.maximum(squares - 2 * points @ centres.T, 0)
    return distances


def _fill_empty(groups: np.ndarray, costs: np.ndarray, num_groups: int) -> None:
    """Gives each group without ids the costliest id of a group that has others; in place."""
    sizes = np.bincount(groups, minlength=num_groups)
    costliest = iter(np.argsort(-costs, kind="stable"))
    for empty in np.flatnonzero(sizes == 0):
        moved = next(i for i in costliest if sizes[groups[i]] > 1)
        sizes[groups[moved]] -= 1
        groups[moved] = empty
        sizes[empty] = 1


def make_tail_basis(teacher: LogitTeacher, sequences: Sequence[TokenSequence], rank: int) -> TailBasis:
    """Returns the `rank` directions in which the teacher's logits vary most at stored positions drawn at random.

    A token's weight is the square root of its mean probability. Directions are rounded to half precision, as they are stored.
    Where the logits vary in fewer directions, as over a corpus that repeats itself, random ones of variance 0 follow.
    Raises UserError if there are too few positions or tokens, if the logits do not vary, or are no numbers.
    """
    check_positions(sequences, rank)
    sequences = list(_some_positions(sequences, POSITIONS_PER_DIRECTION * rank))
    probabilities = teacher.mean_probability(sequences)
    if np.isnan(probabilities).any():
        raise UserError("the teacher gives no log-probabilities that are numbers: try another --dtype")
    weights = np.sqrt(probabilities)
    weights = (weights / weights.sum()).astype(np.float32)
    reference = np.log(np.maximum(probabilities, np.exp(LEAST_LOGPROB))).astype(np.float32)
    offset = reference

    def covariance(block: np.ndarray) -> np.ndarray:
        nonlocal offset
        sums = teacher.covariance_product(sequences, block, reference, weights)
        count = sums[-1, -1]
        products: np.ndarray = sums[:-1, :-1] / count
        mean = sums[:-1, -1] / count
        offset = reference + mean
        products -= np.outer(mean, mean @ (weights[:, None] * block))
        return products

    directions, variances = leading_directions(covariance, weights, rank)
    if len(variances) < rank:
        directions, variances = _filled(directions, variances, weights, rank)
    rounded = np.clip(directions, -HALF_LIMIT, HALF_LIMIT).astype(np.float16).astype(np.float32)
    step = coefficient_step(variances, FINEST_COEFFICIENT_BITS)
    return TailBasis(offset, centred(rounded, weights), weights, step, variances)


def _filled(
    directions: np.ndarray, variances: np.ndarray, weights: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns directions [V, R] and their variances [R], random ones of variance 0 behind those that were found."""
    found = len(variances)
    block = np.random.default_rng(0).standard_normal((len(weights), rank - found), np.float32)
    others = _orthonormal(block, weights, directions)
    if not found or found + others.shape[1] < rank:
        raise UserError(
            f"--tail-rank {rank}: the teacher's logits vary in {found} directions only, choose at most as many"
        )
    logger.info(
        "the teacher's logits vary in %d directions only at the corpus's beginning: the other %d are random",
        found,
        rank - found,
    )
    return np.hstack([directions, others]), np.pad(variances, (0, rank - found))


def coefficient_step(variances: np.ndarray, bits: int) -> float:
    """Returns the step that parts ±3 mean standard deviations of coefficients with such variances by so many bits."""
    return 6 * float(np.sqrt(variances.mean())) / float(2**bits)


def check_positions(sequences: Sequence[TokenSequence], rank: int) -> None:
    """Raises UserError if the different ones of the sequences have too few positions for a basis."""
    available, least = sum(len(sequence.positions) for sequence in _different(sequences)), LEAST_POSITIONS_PER_DIRECTION
    if available < least * rank:
        raise UserError(
            f"--tail-rank {rank}: its basis is made from at least {least * rank} different positions, and there are {available}: "
            f"choose at most {available // least}, or a longer corpus"
        )


def _different(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    return list({sequence.row_id: sequence for sequence in sequences}.values())


def _some_positions(sequences: Sequence[TokenSequence], num_positions: int) -> Iterator[TokenSequence]:
    """Yields sequences, in a random order, with so many stored positions in all if there are as many, drawn at random of each."""
    random = np.random.default_rng(0)
    different = _different(sequences)
    share = -(-num_positions // min(LEAST_SEQUENCES, len(different)))
    left = num_positions
    for index in random.permutation(len(different)):
        sequence = different[index]
        drawn = np.sort(random.permutation(sequence.positions)[: min(share, left)])
        if len(drawn):
            mask = np.zeros(drawn[-1] + 2, dtype=bool)
            mask[drawn + 1] = True
            yield TokenSequence(sequence.input_ids[: len(mask)], mask)
        left -= len(drawn)


def leading_directions(
    covariance: Callable[[np.ndarray], np.ndarray], weights: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the leading eigenvectors of a covariance under weights, [V, ≤ rank], and its variances along them, falling.

    covariance: gives C · diag(w) · block for a block [V, B] that is centred and orthonormal under the weights w, float32 [V].
    The eigenvectors are too, and fewer than `rank` only if there are no more. Block Lanczos with all blocks kept: Golub and
    Underwood 1977; Musco and Musco 2015, arXiv 1504.05477.
    """
    vocab_size = len(weights)
    block = np.random.default_rng(0).standard_normal((vocab_size, min(rank + OVERSAMPLING, vocab_size)), np.float32)
    blocks = products = np.zeros((vocab_size, 0), np.float32)
    for _ in range(PRODUCTS):
        block = _orthonormal(block, weights, blocks)
        if not block.shape[1]:
            break
        blocks = np.hstack([blocks, block])
        block = covariance(block)
        products = np.hstack([products, block])
    within = _inner(blocks, products, weights)
    variances, rotation = np.linalg.eigh((within + within.T) / 2)
    found = min(rank, int((variances > NEGLIGIBLE * variances[-1]).sum()))
    leading = slice(None, -found - 1, -1)
    variances, rotation = variances[leading], rotation[:, leading]
    # Times the covariance once more: the regression of each token's logits on the coefficients, also where its weight is nothing.
    directions = centred(products @ (rotation / variances).astype(np.float32), weights)
    lower = np.linalg.cholesky(_inner(directions, directions, weights))
    directions = directions @ np.linalg.inv(lower).T.astype(np.float32)
    signs = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(found)])
    return directions * signs, variances.astype(np.float32)


def _orthonormal(block: np.ndarray, weights: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns as many directions as a block [V, B] adds to others [V, A], centred and orthonormal under the weights: [V, ≤ B]."""
    block = centred(block, weights)
    rounding = (10 * NEGLIGIBLE) ** 2 * np.trace(_inner(block, block, weights))
    for least in (rounding, 0.5):  # the first time leaves something of the others: of what is rounding, nearly all
        block = block - others @ _inner(others, block, weights).astype(np.float32)
        squares, vectors = np.linalg.eigh(_inner(block, block, weights))
        kept = squares > least
        block = centred(block @ (vectors[:, kept] / np.sqrt(squares[kept])).astype(np.float32), weights)
    return block


def _inner(left: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns leftᵀ diag(w) right, summed in float64: [A, B]."""
    total = np.zeros((left.shape[1], right.shape[1]))
    for start in range(0, len(weights), INNER_ROWS):
        rows = slice(start, start + INNER_ROWS)
        total += left[rows].T.astype(np.float64) @ (weights[rows, None] * right[rows])
    return total
