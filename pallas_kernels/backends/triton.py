"""What kernels for Triton have in common: where they can run, and packed words in them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.numbers.packing import WORD_BITS

pltriton: Any

try:
    from jax.experimental.pallas import triton as pltriton
except ImportError:
    pltriton = None  # a backend that every other platform can do without


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a product is cut; powers of two, but `splits`.

    Attributes:
        m: rows of x in a tile, at least 16.
        n: columns of the weight in a tile, at least 16.
        k: how much of K is in a tile, at least 32; the size of a group is a multiple of it.
        splits: parts that what is contracted is cut into, for different programs; 1 for integers in groups.
        warps: of a program.
        stages: tiles that are loaded ahead.
    """

    m: int
    n: int
    k: int
    splits: int
    warps: int
    stages: int


def splits_of(contracted: int, step: int, tiles: int) -> int:
    """Parts to cut what is contracted into, where there are so many tiles: enough for each multiprocessor of an A100.

    Args:
        contracted: size of the axis.
        step: of its tiles.
        tiles: of the results.
    """
    return max(1, min(2 * gpu_chips.CHIPS["a100"].processors // tiles, pl.cdiv(contracted, 8 * step), 16))


def launch(
    kernel: Callable[..., None],
    operands: Sequence[Array],
    *,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    blocks: Any,
    name: str,
    interpret: bool,
) -> list[Array]:
    """Runs a kernel that loads and stores what it wants of operands and results in global memory.

    Args:
        kernel: of one program, from references to operands and results.
        operands: in global memory.
        out_shape: of the results.
        grid: of programs.
        blocks: anything with `warps` and `stages` of a program.
        name: of the kernel.
        interpret: runs it as XLA operations, on any platform.
    """
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        in_specs=[anywhere] * len(operands),
        out_specs=[anywhere] * len(out_shape),
        compiler_params=pltriton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        name=name,
        interpret=interpret,
    )(*operands)
    return list(out)


def unavailable() -> str | None:
    """Why no such kernel is part of a program, or None."""
    chip = gpu_chips.asked_for()
    if chip is None:
        return 'kernels for GPU, which none has run yet, are used in target_chip("h100") only'
    if chip.capability < 80:
        return "the kernels are for GPUs of compute capability 8.0 and later"
    if pltriton is None:
        return "this version of JAX has no Triton"
    if not finds_device():
        return "from jax 0.11 on Triton needs a GPU, or the abstract one of a mesh (jax.sharding.use_abstract_mesh)"
    return None


def unaddressable(a: Any) -> str | None:
    """Why a kernel cannot read all of an array, or None; anything with a shape and a dtype.

    Pallas computes offsets in 32 bits up to 4 GiB, and Triton takes them to have a sign.
    """
    if a.dtype.itemsize == 1 and 2**31 < math.prod(a.shape) <= 2**32:
        return "Pallas does not address arrays of bytes between 2 and 4 GiB"
    return None


def unpack(words: Int[Array, "A B"], bits: int) -> Int[Array, "A _"]:
    """Signed codes, int32, of 32-bit words that lie along the last axis, the lowest in the lowest bits; int8 as it is.

    Halves of the codes are joined, and halves of those, so that the codes of a word stay side by side in one thread,
    which stores them to shared memory in one piece: the tensor cores take them from there.

    Args:
        words: a tile.
        bits: of a code: 2, 4 or 8.
    """
    if bits == 8:
        return words
    count = WORD_BITS // bits
    codes = [(words << (WORD_BITS - bits * (i + 1))) >> (WORD_BITS - bits) for i in range(count)]
    while (half := len(codes) // 2) > 0:
        codes = [jnp.stack([codes[i], codes[i + half]], axis=-1) for i in range(half)]
    return codes[0].reshape(words.shape[0], -1)


def spread(words: Int[Array, "A B"]) -> Int[Array, "_ B"]:
    """Signed codes of 4 bits, int32, of 32-bit words that lie along the first axis, the lowest in the lowest bits.

    The codes of a word go to different threads, and each is stored to shared memory by itself, but in an order that
    `ldmatrix` reads. What `unpack` stores in few pieces comes back by plain loads and is moved between registers, the
    more so the more rows the other operand has: with 128, Ampere has a third fewer instructions with `spread`.
    """
    rows, columns = words.shape
    place = 4 * lax.broadcasted_iota(jnp.int32, (rows, 8, columns), 1)
    words = lax.broadcast_in_dim(words, place.shape, (0, 2))
    return ((words << (28 - place)) >> 28).reshape(8 * rows, columns)


def finds_device() -> bool:
    """Whether there is the device, of this machine or abstract, that Triton's lowering asks for from jax 0.11 on."""
    if jax.__version_info__ < (0, 11):
        return True
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return abstract is not None or jax.devices()[0].platform == "gpu"
