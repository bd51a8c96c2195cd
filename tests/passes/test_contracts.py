"""What qjax reads of JAX that JAX does not promise: each name and parameter, so that a new release fails here first."""

from __future__ import annotations

import inspect
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.extend.core import primitives as prims
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jax.interpreters import mlir
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.control_flow import bodies, consts_of, evaluate

X = jnp.ones((3, 4))


def equation(fn, *args):
    return jax.make_jaxpr(fn)(*args).jaxpr.eqns[-1]


@jax.custom_vjp
def squared(x):
    return x * x


squared.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))


@jax.custom_jvp
def doubled(x):
    return 2 * x


doubled.defjvp(lambda p, t: (2 * p[0], 2 * t[0]))

MESH = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,))

# primitive name -> (a program whose last equation is it, the parameters that control_flow.py reads)
HIGHER_ORDER = {
    "scan": (
        lambda x: lax.scan(lambda c, r: (c + r.sum(), r), 0.0, x),
        {"jaxpr", "length", "reverse", "unroll"},
    ),
    "while": (
        lambda x: lax.while_loop(lambda c: c[0].sum() < 9, lambda c: (c[0] + 1, c[1]), (x, x)),
        {"cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"},
    ),
    "cond": (lambda x: lax.cond(x.sum() > 0, lambda x: x, lambda x: -x, x), {"branches"}),
    "jit": (lambda x: jax.jit(lambda x: x + 1)(x), {"jaxpr", "name", "in_shardings", "out_shardings"}),
    "remat2": (lambda x: jax.checkpoint(lambda x: x + 1)(x), {"jaxpr", "prevent_cse", "policy"}),
    "custom_jvp_call": (doubled, {"call_jaxpr"}),
    "custom_vjp_call": (squared, {"call_jaxpr"}),
    "shard_map": (
        lambda x: jax.shard_map(lambda x: x + 1, mesh=MESH, in_specs=P("a"), out_specs=P("a"))(x),
        {"jaxpr", "mesh", "in_specs", "out_specs", "check_vma", "newly_manual_axes"},
    ),
}


@pytest.mark.parametrize("name", HIGHER_ORDER)
def test_higher_order_parameters(name: str):
    program, read = HIGHER_ORDER[name]
    eqn = equation(program, X)
    if name == "cond" and eqn.primitive.name != "cond":
        pytest.fail(f"lax.cond traces to {eqn.primitive}")
    assert read <= set(eqn.params), set(eqn.params)
    for body in bodies(eqn):
        assert len(body.feeds) == len(body.jaxpr.invars)
        assert len(body.results) == len(eqn.outvars)
    assert bodies(eqn)


def test_scan_split():
    eqn = equation(lambda x, w: lax.scan(lambda c, r: (c + (r * w).sum(), r), 0.0, x), X, jnp.ones(4))
    assert control_flow.scan_counts(eqn.params) == (1, 1)
    assert [feed.how for feed in bodies(eqn)[0].feeds] == ["whole", "carried", "scanned"]


def test_closed_jaxprs_carry_their_constants():
    table = jnp.arange(4.0)
    closed = jax.make_jaxpr(lambda x: x + table)(X)
    assert len(consts_of(closed)) == len(closed.jaxpr.constvars) == 1
    assert consts_of(equation(lambda x: jax.checkpoint(lambda x: x + 1)(x), X).params["jaxpr"]) == ()
    assert jnp.array_equal(evaluate(closed, [X])[0], X + table)


SITES = {
    "dot_general": (lambda x: x @ x.T, {"dimension_numbers", "precision", "preferred_element_type"}),
    "gather": (
        lambda x: x[jnp.asarray([0, 2])],
        {"dimension_numbers", "slice_sizes", "mode", "fill_value"},
    ),
    "conv_general_dilated": (
        lambda x: lax.conv_general_dilated(x[None, None], jnp.ones((1, 1, 2, 2)), (1, 1), "SAME"),
        {"dimension_numbers"},
    ),
    "ragged_dot_general": (
        lambda x: lax.ragged_dot(x, jnp.ones((2, 4, 5)), jnp.asarray([1, 2])),
        {"ragged_dot_dimension_numbers", "precision", "preferred_element_type", "group_offset", "out_sharding"},
    ),
}


@pytest.mark.parametrize("name", SITES)
def test_site_parameters(name: str):
    program, read = SITES[name]
    eqn = equation(program, X)
    assert eqn.primitive.name == name
    assert read <= set(eqn.params), set(eqn.params)


def test_a_lowering_sees_how_many_devices_there_are():
    """What `ops.partition` reads to know that XLA will split a program, inside `shard_map` and outside."""
    seen = []
    probe = Primitive("probe")
    probe.def_abstract_eval(lambda x: x)

    def rule(ctx, x):
        seen.append(ctx.module_context.axis_context)
        return [x]

    mlir.register_lowering(probe, rule)
    jax.jit(probe.bind).lower(X)
    jax.jit(jax.shard_map(probe.bind, mesh=MESH, in_specs=P("a"), out_specs=P("a"))).lower(X)
    outside, inside = seen
    assert outside.num_devices == 1 and not hasattr(outside, "manual_axes")
    assert inside.manual_axes == {"a"} == set(inside.mesh.axis_names)
    assert set(inside.mesh.manual_axes) <= {"a"}


def test_exported_primitives():
    assert control_flow.ragged_dot_general_p is equation(SITES["ragged_dot_general"][0], X).primitive
    for name in ("dot_general_p", "gather_p", "scan_p", "while_p", "cond_p", "jit_p", "remat_p", "custom_vjp_call_p"):
        assert hasattr(prims, name), name


def test_indexing_traces_to_views():
    """`w[i]` must stay slice/squeeze (static) and dynamic_slice (traced): the view table knows those."""
    w = jnp.ones((3, 4, 5))
    assert [e.primitive.name for e in jax.make_jaxpr(lambda w: w[1])(w).jaxpr.eqns] == ["slice", "squeeze"]
    dynamic = [e.primitive.name for e in jax.make_jaxpr(lambda w, i: w[i])(w, 1).jaxpr.eqns]
    assert dynamic[-2:] == ["dynamic_slice", "squeeze"]


# --- Mosaic GPU -------------------------------------------------------------------------------------------------------

# of `jax.experimental.pallas.mosaic_gpu`, what the kernels for NVIDIA Hopper call, and what they give by name
MOSAIC_GPU: dict[str, set[str]] = {
    "Barrier": {"num_arrivals", "num_barriers"},
    "CompilerParams": {"lowering_semantics", "unsafe_no_auto_barriers"},
    "ShapeDtypeStruct": {"layout"},
    "SwizzleTransform": set(),
    "TilingTransform": set(),
    "WGMMAAccumulatorRef": set(),
    "barrier_arrive": set(),
    "barrier_wait": set(),
    "commit_smem": set(),
    "copy_gmem_to_smem": set(),
    "copy_smem_to_gmem": set(),
    "inline_mgpu": {"arg_types", "return_type"},
    "kernel": {
        "out_type",
        "grid",
        "grid_names",
        "num_threads",
        "thread_name",
        "scratch_types",
        "compiler_params",
        "interpret",
    },
    "layout_cast": set(),
    "load": {"layout", "optimized"},
    "nd_loop": {"collective_axes", "init_carry"},
    "planar_snake": set(),
    "set_max_registers": {"action"},
    "wait_smem_to_gmem": {"wait_read_only"},
    "wgmma": set(),
    "wgmma_wait": set(),
}


@pytest.mark.parametrize("name", MOSAIC_GPU)
def test_mosaic_gpu_names(name: str):
    parameters = inspect.signature(getattr(plgpu, name)).parameters
    assert MOSAIC_GPU[name] <= set(parameters), parameters


def test_mosaic_gpu_memory_and_layouts():
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    assert plgpu.SMEM((2, 64, 64), jnp.bfloat16, transforms=transforms).shape == (2, 64, 64)
    for name in ("WGMMA", "WGMMA_8BIT", "WGMMA_TRANSPOSED", "WGMMA_UPCAST_2X", "WGMMA_UPCAST_4X"):
        assert hasattr(plgpu.Layout, name), name
    assert all(plgpu.Layout.WGMMA.reduce(axis) is not None for axis in (0, 1))
    assert hasattr(plgpu.LoweringSemantics, "Lane")


def test_mosaic_gpu_of_each_version():
    """Where `pallas_kernels.backends.mosaic` asks for the version: loads had an index, and kernels no interpreter."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    old = jax.__version_info__ < (0, 11)
    assert old == (index is not None and index.default is inspect.Parameter.empty)
    assert old != hasattr(plgpu, "InterpretGPUParams")


def test_registers_of_mosaic_gpu():
    """What `tile_mosaic_gpu` does inside a kernel, and no interpreter shows: bytes in the order of `prmt` of PTX."""
    with mlir.make_ir_context(), ir.Location.unknown():
        i32, module = ir.IntegerType.get_signless(32), ir.Module.create()
        with ir.InsertionPoint(module.body):
            first, second, selector = (mgpu.c(value, i32) for value in (11, 12, 13))
            utils.prmt(first, second, arith.shrui(arith.ori(arith.andi(selector, first), second), first))
            array = mgpu.FragmentedArray.splat(mgpu.c(0.0, ir.BF16Type.get()), (64, 32), plgpu.Layout.WGMMA.to_mgpu())
            assert jax.tree.leaves(array) == list(array.registers.flat)
            pairs = [array.registers.flat[i] for i in range(2)]
            word = utils.bitcast(utils.vector_concat(pairs), ir.IntegerType.get_signless(64))
            assert str(word.type) == "i64"
    assert re.search(r'"prmt\.b32 \$0, \$1, \$2, \$3;", "=r,r,r,r" %c11_i32, %c12_i32, ', str(module)), module


def test_types_say_over_which_mesh_axes_they_vary():
    """What `control_flow.varying` reads, inside `shard_map` and outside."""
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = []

    def fn(w, x):
        seen.append([jax.typeof(a).manual_axis_type.varying for a in (w, x)])
        seen.append(jax.typeof(control_flow.varying(w, jax.typeof(x))).manual_axis_type.varying)
        return x

    x = jnp.ones((2, 4))
    specs = (jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("rows"))
    jax.eval_shape(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=specs[1]), x, x)
    assert seen == [[frozenset(), frozenset({"rows"})], frozenset({"rows"})]
    assert control_flow.varying(x, jax.typeof(x)) is x
