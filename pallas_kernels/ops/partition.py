"""Packed products over several devices: what each device multiplies, and what is summed.

A product of x `(*stack, M, K)` and a packed matrix `(*stack, K, N)` follows the packed words; the scales follow them:

    the mesh splits        each device has                     communication
    N, columns             its columns of the result           none
    K, rows                its part of every sum               one all-reduce of the result
    M, rows of x           its rows of the result              none
    stack, experts         its matrices                        none

(With `transpose`, N and K change places.) A device that has part of K must have whole words and whole groups of it;
`check_placement` says where it has not. The axis that `layer` indexes is not split: each step of a scan would read
another device's layer. Parts of a sum are added in float32 or int32; XLA for TPU narrows that to bfloat16 where the
result is.

JAX has two kinds of mesh axes, and only one of them says where things are while a program is traced:

**Explicit** axes, which `jax.make_mesh` gives. The lowering is a `shard_map` in which each device runs its platform's
own kernel on its shards. A sharding that cannot be multiplied like this is an error when the program is traced.

**Auto** axes: XLA chooses after the lowering, and it partitions only what it can look into, which a kernel is not. The
lowering is a formulation that XLA partitions like the above: dequantize and multiply, or one batched dot of integers
for all groups. So there is no kernel, and no check. Axes of a `shard_map` that leaves others to XLA count as Auto.
(`custom_partitioning` has XLA ask Python how to partition a call, but libtpu does not implement that, and a program
that contains it cannot be exported.)

Inside a `shard_map` over all axes of a mesh nothing of this applies: the operands are what one device has.

**Equal results.** Products of integers are the same to the last bit as on one device, but where K is split and has
several groups (or, with Auto axes, wherever it has several): then the scaled sums of groups are added in another
order. Products of floats are the same up to the order of their sums.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from qjax.pallas_kernels.numbers import packing, stored_scales
from qjax.pallas_kernels.numbers.exact import finite
from qjax.pallas_kernels.numbers.stored_scales import Scales
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, pick_layer

Names = tuple[str, ...]
"""Mesh axes that split one axis of an array, outer to inner; none for a whole axis."""

# --- Lowering --------------------------------------------------------------------------------------------------


def lowering(
    kernel: Callable[..., Any], plain: Callable[..., Any], *, multiple_results: bool = False
) -> Callable[..., Any]:
    """A lowering rule of a primitive.

    Args:
        kernel: what one device runs; with explicit axes, it splits the work itself (`matmul`, `integer_matmul`).
        plain: the same in operations that XLA can partition.
        multiple_results: whether both return a list of arrays, as the primitive does.
    """

    def rule(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        chosen = plain if _left_to_xla(ctx) else kernel
        return mlir.lower_fun(chosen, multiple_results=multiple_results)(ctx, *operands, **params)

    return rule


def _left_to_xla(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether the program is for several devices and XLA is to split it: no kernel can be in it then."""
    if any(is_explicit(aval) for aval in ctx.avals_in):
        return False
    context: Any = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):  # inside a shard_map
        return context.manual_axes | set(context.mesh.manual_axes) != set(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) > 1


# --- Explicit axes: who has what -------------------------------------------------------------------------------


def is_explicit(aval: Any) -> bool:
    """Whether the type of an array says which mesh axes split it."""
    mesh = getattr(aval, "sharding", None) and aval.sharding.mesh
    return bool(mesh) and not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)


def whole(otherwise: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For an operation that devices do not split: from what one device computes to that, or `otherwise` on a mesh."""

    def on_mesh(implementation: Callable[..., Any]) -> Callable[..., Any]:
        def computed(*operands: Any, **options: Any) -> Any:
            placed = any(is_explicit(jax.typeof(a)) for a in jax.tree.leaves(operands))
            return (otherwise if placed else implementation)(*operands, **options)

        return computed

    return on_mesh


def _names(a: Any) -> tuple[Names, ...]:
    """The mesh axes that split each axis of an array, or of the arrays of a type."""
    spec = a.sharding.spec
    entries = [*spec, *[None] * (a.ndim - len(spec))]
    return tuple(() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries)


def check_placement(w: QTensor, path: str) -> None:
    """Refuses packed arrays of which a device has part of K that is not made of whole words and groups.

    Args:
        w: packed weight; arrays that no `NamedSharding` places pass.
        path: its name, for the error.

    Raises:
        ValueError: with how the weight is split, and how to split it instead.
    """
    sharding = w.words.sharding
    if isinstance(sharding, NamedSharding):
        rows = _names(w.words)[-2 if w.order == "kn" else -1]
        _check_rows(w, math.prod(sharding.mesh.shape[name] for name in rows), f"{path!r}, {_describe(w)},")


def _say(names: Names) -> str:
    return f"mesh axes {', '.join(names)}" if names else "no mesh axis"


def _describe(w: QTensor) -> str:
    return f"a packed {w.spec} matrix with K={w.layout.k} and N={w.layout.n}"


def _check_rows(w: QTensor, parts: int, what: str) -> None:
    """Whether K can be cut into `parts`."""
    k, group = w.layout.k, w.group_size
    width, *other_planes = packing.PLANES.get(w.spec.format.bits, (packing.WORD_BITS,))
    if parts == 1:
        return
    if other_planes:
        raise ValueError(
            f"qjax: {what} is split along K over {parts} devices. {w.spec.format} is stored as bit planes, one after "
            "the other along that axis, so that no part of the words is a part of K. Shard N, or use a format of 2, 4 "
            "or 8 bits."
        )
    unit = packing.WORD_BITS // width
    if group < k:
        unit = math.lcm(unit, group)
    if k % (parts * unit):
        most = max((d for d in range(1, parts) if k % (d * unit) == 0), default=1)
        instead = f"K over {most} devices" if most > 1 else "N"
        raise ValueError(
            f"qjax: {what} is split along K over {parts} devices, {k / parts:g} values each. That cuts groups or "
            f"words: a part must be a multiple of {unit} values. Shard {instead}, or use other groups."
        )


@dataclasses.dataclass(frozen=True)
class Split:
    """How a mesh splits a product: the mesh axes for each axis of `(*stack, M, K) @ (*stack, K, N)`."""

    mesh: Any
    stack: tuple[Names, ...]
    m: Names
    k: Names
    n: Names

    @staticmethod
    def of(x: Any, w: QTensor, *, indexed: bool, transpose: bool = False) -> Split | None:
        """The split that the types of x and the packed arrays ask for; None where no mesh has explicit axes.

        Args:
            x: type (`jax.typeof`) of the activations, `(*stack, M, K)` or, with `transpose`, `(*stack, M, N)`.
            w: packed weight with types for leaves.
            indexed: whether the leading axis of the weight is one of layers.
            transpose: as for `quantized_matmul`.

        Raises:
            ValueError: each device cannot multiply what it has; the message says what to shard otherwise.
        """
        mesh = next((a.sharding.mesh for a in (x, *jax.tree.leaves(w)) if is_explicit(a)), None)
        if mesh is None:
            return None
        *lead, k, n = _names(w.words)
        k, n = (k, n) if w.order == "kn" else (n, k)
        *stack, m, contracted = _names(x)
        what = _describe(w)
        if indexed and lead.pop(0):
            raise ValueError(
                f"qjax: the layers of {what} are split over devices, and a product with one of them would fetch it. "
                "Leave the axis of the layers whole and shard K, N or the stack."
            )
        for axis, given, own in [
            *(("the stack", s, e) for s, e in zip(stack, lead, strict=True)),
            ("N" if transpose else "K", contracted, n if transpose else k),
        ]:
            if given and given != own and (own or axis != "the stack"):
                raise ValueError(
                    f"qjax: {what} is multiplied by an x that is split along {axis} over {_say(given)}; the words are "
                    f"split over {_say(own)}. Shard both alike, or leave x whole there (jax.sharding.reshard)."
                )
        split = Split(mesh, tuple(e or s for s, e in zip(stack, lead, strict=True)), m, k, n)
        used = collections.Counter(name for names in (*split.stack, m, k, n) for name in names)
        if twice := [name for name, count in used.items() if count > 1]:
            raise ValueError(
                f"qjax: mesh axis {twice[0]!r} splits two axes of one product, of x as {x.sharding.spec} and {what}, "
                f"its words as {w.words.sharding.spec}. Reshard one of them (jax.sharding.reshard)."
            )
        _check_rows(w, split.parts(k), what)
        return split

    def parts(self, names: Names) -> int:
        """Into how many parts mesh axes split an array axis."""
        return math.prod(self.mesh.shape[name] for name in names)

    def rows(self, columns: Names = ()) -> P:
        """The specification of an array `(*stack, M, columns)`."""
        return P(*self.stack, self.m, columns)

    def weight(self, w: QTensor) -> QTensor:
        """The specification of each packed array; what is 1 along an axis is on all devices."""

        def follow(a: Any) -> P:
            axes = (self.k, self.n) if w.order == "kn" else (self.n, self.k)
            last = [names if size > 1 else () for names, size in zip(axes, a.shape[-2:], strict=True)]
            return P(*[()] * (a.ndim - 2 - len(self.stack)), *self.stack, *last)

        def whole(a: Any) -> P:
            return P(*[()] * (a.ndim - 2 - len(self.stack)), *self.stack, (), ())

        scales = dataclasses.replace(
            jax.tree.map(follow, w.scales),
            absmax=jax.tree.map(whole, w.scales.absmax),
            offset=jax.tree.map(whole, w.scales.offset),
        )
        return dataclasses.replace(w, words=follow(w.words), scales=scales)

    def local(self, w: QTensor, layer: Any) -> tuple[QTensor, Any]:
        """What one device has, inside the `shard_map`, as a packed weight of its own, and the layer of it."""
        k, n = w.layout.k // self.parts(self.k), w.layout.n // self.parts(self.n)
        if w.scales.absmax is not None:  # its blocks run through all columns
            w, layer = pick_layer(w, layer), None
            w = dataclasses.replace(w, scales=self._plain_scales(w))
        return dataclasses.replace(w, layout=Layout((((k, "k"),), ((n, "n"),)))), layer

    def _plain_scales(self, w: QTensor) -> Scales:
        """`numerics.plain_scales` of the groups and columns that one device has."""
        scales = w.matrix_arrays()[1]
        *_, groups, columns = scales.values.shape
        g = lax.axis_index(self.k) * groups + jnp.arange(groups) if self.k else jnp.arange(groups)
        n = lax.axis_index(self.n) * columns + jnp.arange(columns) if self.n else jnp.arange(columns)
        block = (n * groups * self.parts(self.k) + g[:, None]) // stored_scales.NESTED_BLOCK
        absmax = jnp.take(scales.absmax[..., 0], block, axis=-1)  # (*stack, G, N)
        unit = jnp.asarray(stored_scales.dynamic_map())[scales.values.astype(jnp.int32)]
        values = finite(unit * absmax) + scales.offset
        return Scales(values if w.order == "kn" else jnp.swapaxes(values, -1, -2), w.scales.zero)

    def run(self, local: Callable[..., Array], operands: Any, specs: Any, out: P) -> Array:
        """`local(*operands)` on every device, with its shards; whole operands are cut where they are to be split."""
        leaves, tree = jax.tree.flatten(operands)
        leaves = [
            jax.sharding.reshard(a, NamedSharding(self.mesh, spec))
            for a, spec in zip(leaves, tree.flatten_up_to(specs), strict=True)
        ]
        # Replication is not tracked: the kernels do not say how their results vary over devices.
        mapped = jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)
        return mapped(*jax.tree.unflatten(tree, leaves))


def result(
    shape: tuple[int, ...], dtype: Any, x: Any, w: QTensor, *, indexed: bool, transpose: bool = False
) -> ShapedArray:
    """The type of a product, from those of its operands; arguments and errors as for `Split.of`."""
    split = Split.of(x, w, indexed=indexed, transpose=transpose)
    if split is None:
        return ShapedArray(shape, dtype)
    return ShapedArray(shape, dtype, sharding=NamedSharding(split.mesh, split.rows(split.k if transpose else split.n)))


def like(a: Array, aval: Any) -> Array:
    """`a`, moved to the explicit sharding of `aval` if it has one."""
    return jax.sharding.reshard(a, aval.sharding) if is_explicit(aval) else a
