"""The ring of stages in shared memory between the warpgroup of a Mosaic GPU kernel that copies and those that multiply.

A stage has a tile of x and one of each weight. It is full when all copies to it have arrived, and empty again when the
step after it has begun in every warpgroup: then its words are in registers, or were multiplied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from qjax.pallas_kernels.backends.mosaic_blocks import Blocks
from qjax.pallas_kernels.backends.mosaic_operands import Tile, Weight


def barriers(blocks: Blocks, weights: int) -> dict[str, Any]:
    """Those of a ring with tiles of so many weights: of a full stage, and of an empty one."""
    return {
        "full": plgpu.Barrier(num_arrivals=1 + weights, num_barriers=blocks.stages),
        "empty": plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=blocks.stages),
    }


@dataclasses.dataclass(frozen=True)
class Ring:
    """A ring in a kernel.

    Attributes:
        blocks: how the product is cut.
        x: tiles of x, `(stages, rows, k)`; below those of x there may be rows that are not copied.
        w: tiles of the weights, `(stages, weights, n, k)`.
        full, empty: the barriers of each stage.
    """

    blocks: Blocks
    x: Any
    w: Any
    full: Any
    empty: Any

    @staticmethod
    def of(blocks: Blocks, scratch: dict[str, Any]) -> Ring:
        """From the scratch of a kernel."""
        return Ring(blocks, scratch["x_ring"], scratch["w_ring"], scratch["full"], scratch["empty"])

    def next(self, stage: Int32[Array, ""]) -> Int32[Array, ""]:
        """The stage that follows."""
        return jnp.where(stage == self.blocks.stages - 1, 0, stage + 1)

    def fill(self, x_ref: Any, weights: Sequence[Weight], tile: Tile, steps: int, stage: Array) -> Array:
        """Starts the copies of all steps of a tile of a result, from this stage on; returns the stage after them."""
        blocks, ring = self.blocks, self.x

        def step(i: Any, stage: Array) -> Array:
            plgpu.barrier_wait(self.empty.at[stage])
            ks = pl.ds((tile.split * steps + i) * blocks.k, blocks.k)
            for number, w in enumerate(weights):
                plgpu.copy_gmem_to_smem(
                    w.words.at[w.first + tile.matrix, pl.ds(tile.n, blocks.n), ks],
                    self.w.at[stage, number],
                    self.full.at[stage],
                )
            target = ring.at[stage] if ring.shape[1] == blocks.m else ring.at[stage, pl.ds(0, blocks.m), :]
            plgpu.copy_gmem_to_smem(x_ref.at[tile.matrix, pl.ds(tile.m, blocks.m), ks], target, self.full.at[stage])
            return self.next(stage)

        return lax.fori_loop(0, steps, step, stage)

    def begin(self) -> None:
        """Says that stages are free: one is when the step after it begins, so all but the last."""
        for stage in range(self.blocks.stages - 1):
            plgpu.barrier_arrive(self.empty.at[stage])

    def free_before(self, stage: Array) -> None:
        """Says that the stage before this one was read."""
        before = jnp.where(stage == 0, self.blocks.stages - 1, stage - 1)
        plgpu.barrier_arrive(self.empty.at[before])

    def drain(self, stage: Array) -> None:
        """Waits until all has been multiplied."""
        for _ in range(self.blocks.stages - 1):
            plgpu.barrier_wait(self.empty.at[stage])
            stage = self.next(stage)
