"""Packed models on four virtual CPU devices, in a process apart: convert, restore and `shard_map`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import qjax

mesh = jax.make_mesh((4,), ("m",), axis_types=(AxisType.Auto,))
columns = NamedSharding(mesh, P(None, "m"))
spec = qjax.int4(group=16, scale=qjax.AbsMax())
keys = jax.random.split(jax.random.key(0), 3)
params = {"a": jax.random.normal(keys[0], (64, 128)), "b": jax.random.normal(keys[1], (128, 32))}
x = jax.random.normal(keys[2], (2, 64))


def model(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


q = qjax.quantize(model, spec)
packed = q.convert(params, x)
expected = jax.jit(q.apply)(packed, x)
qjax.save(sys.argv[1], q, packed)

# float weights that are sharded give packed ones that are, with the same bits
sharded = q.convert(jax.device_put(params, columns), x)
assert sharded["a"].words.sharding.spec == P(None, "m"), sharded["a"].words.sharding
for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(sharded), strict=True):
    np.testing.assert_array_equal(one, other)

# restored straight to shards
_, restored = qjax.restore(sys.argv[1], model, shardings=lambda name, aval: columns)
for leaf in jax.tree.leaves(restored):
    assert leaf.sharding.spec == P(None, "m")
    assert leaf.addressable_shards[0].data.shape[1] == leaf.shape[1] // 4
np.testing.assert_allclose(jax.jit(q.apply)(restored, x), expected, rtol=1e-5, atol=1e-5)


# inside shard_map each shard has its part of the packed weight, stacked or not
def manual(p, x):
    first = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P(), P(None, "m")), out_specs=P(None, "m"))
    return first(x, p["a"])


q = qjax.quantize(manual, qjax.Rule("a", spec))
served = q.convert({"a": params["a"]}, x)
trained, out = jax.jit(lambda p, s: (q.apply(p, x), q.apply(s, x)))({"a": params["a"]}, served)
np.testing.assert_allclose(out, trained, rtol=1e-5, atol=1e-5)
np.testing.assert_allclose(out, x @ served["a"].dequantize(), rtol=1e-5, atol=1e-5)
print("ok")
"""


def test_four_devices(tmp_path):
    root = Path(__file__).parent.parent
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model")]
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    assert out.stdout.endswith("ok\n"), out.stderr
