"""The demonstration language model of the quickstart: a small byte-level decoder and the text it reads.

What this module gives:

* `LMConfig` and `LM`: a causal transformer in Flax Linen (RMSNorm, rotary positions, grouped-query
  attention, SwiGLU, no biases) over the 256 byte values. Its layers are stacked with `nn.scan`, or, with
  `scan_layers=False`, are the separate submodules `layer_0`, `layer_1`, ...; `unstack_params` turns the
  parameters of the first form into those of the second.
* `load_corpus`, `batches`, `eval_batches`: the source text of Python's own standard library, with whole
  modules held out of training.
* `load_weights`, `save_weights`: the trained parameters in `lm_weights/weights.npz`.
* `bits_per_byte`, `generate`: the score and the sampler, for any `apply_fn(variables, tokens) -> logits`.
"""

import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

WEIGHTS = Path(__file__).resolve().parent / "lm_weights" / "weights.npz"

Params = dict[str, Any]
ApplyFn = Callable[[Any, jax.Array], jax.Array]
Bytes = NDArray[np.uint8]
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class LMConfig:
    """The sizes of the model; the defaults are those of the stored weights."""

    vocab_size: int = 256
    d_model: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    mlp_dim: int = 768
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse sizes that the attention cannot split."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary positions turn pairs of features")


def rotary_angles(length: int, head_dim: int, base: float) -> jax.Array:
    """Return the angles [length, head_dim / 2] by which rotary positions turn each feature pair."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies


def apply_rotary(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate the features of `x` [batch, length, heads, head_dim] by `angles` [length, head_dim / 2]."""
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _residual_init(config: LMConfig) -> nn.initializers.Initializer:
    """Initialize what is added to the residual stream, so that its variance does not grow with depth."""
    return nn.initializers.variance_scaling(0.5 / config.num_layers, "fan_in", "truncated_normal")


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: LMConfig

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        """Attend over `x` [batch, length, d_model]."""
        c = self.config
        batch, length, _ = x.shape
        query = nn.DenseGeneral((c.num_heads, c.head_dim), use_bias=False, name="q")(x)
        key = nn.DenseGeneral((c.num_kv_heads, c.head_dim), use_bias=False, name="k")(x)
        value = nn.DenseGeneral((c.num_kv_heads, c.head_dim), use_bias=False, name="v")(x)
        query, key = apply_rotary(query, angles), apply_rotary(key, angles)

        groups = c.num_heads // c.num_kv_heads
        query = query.reshape(batch, length, c.num_kv_heads, groups, c.head_dim) * c.head_dim**-0.5
        scores = jnp.einsum("btkgd,bskd->bkgts", query, key)
        causal = jnp.tril(jnp.ones((length, length), dtype=bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(scores.dtype).min), axis=-1)
        context = jnp.einsum("bkgts,bskd->btkgd", weights, value)
        context = context.reshape(batch, length, c.num_heads, c.head_dim)
        return nn.DenseGeneral(c.d_model, axis=(-2, -1), use_bias=False, kernel_init=_residual_init(c), name="out")(
            context
        )


class MLP(nn.Module):
    """The SwiGLU feed-forward network."""

    config: LMConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform each position of `x` [batch, length, d_model]."""
        c = self.config
        gate = nn.Dense(c.mlp_dim, use_bias=False, name="gate")(x)
        up = nn.Dense(c.mlp_dim, use_bias=False, name="up")(x)
        return nn.Dense(c.d_model, use_bias=False, kernel_init=_residual_init(c), name="down")(nn.silu(gate) * up)


class Layer(nn.Module):
    """One pre-norm transformer layer, in the carry form that `nn.scan` asks for."""

    config: LMConfig

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> tuple[jax.Array, None]:
        """Add the attention and the feed-forward network to the residual stream `x`."""
        epsilon = self.config.norm_epsilon
        normed = nn.RMSNorm(epsilon=epsilon, name="attention_norm")(x)
        x = x + Attention(self.config, name="attention")(normed, angles)
        normed = nn.RMSNorm(epsilon=epsilon, name="mlp_norm")(x)
        return x + MLP(self.config, name="mlp")(normed), None


class LM(nn.Module):
    """The language model: tokens [batch, length] to logits [batch, length, vocab_size].

    With `scan_layers` the layers' parameters are stacked along a leading axis under `layers`; without it
    they lie under `layer_0`, `layer_1`, ...
    """

    config: LMConfig = LMConfig()
    scan_layers: bool = True

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Score, at each position, every value of the next byte."""
        c = self.config
        x = nn.Embed(c.vocab_size, c.d_model, name="embed")(tokens)
        angles = rotary_angles(tokens.shape[1], c.head_dim, c.rope_base)
        if self.scan_layers:
            stack = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=c.num_layers,
            )
            x, _ = stack(c, name="layers")(x, angles)
        else:
            for i in range(c.num_layers):
                x, _ = Layer(c, name=f"layer_{i}")(x, angles)
        x = nn.RMSNorm(epsilon=c.norm_epsilon, name="final_norm")(x)
        return nn.Dense(c.vocab_size, use_bias=False, name="lm_head")(x)


def unstack_params(params: Mapping[str, Any]) -> Params:
    """Turn the parameters of `LM(scan_layers=True)` into those of `LM(scan_layers=False)`."""
    unrolled = {name: value for name, value in params.items() if name != "layers"}
    num_layers = jax.tree.leaves(params["layers"])[0].shape[0]
    for i in range(num_layers):
        unrolled[f"layer_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
    return unrolled


# Whole modules, so that no held-out text has a sibling passage of its own file in the training text.
HELD_OUT = frozenset(
    {
        *("argparse", "bisect", "calendar", "cmd", "csv", "fractions", "gzip", "heapq", "imaplib"),
        *("json", "queue", "sched", "shelve", "shlex", "statistics", "string", "textwrap"),
    }
)

# Tests, vendored or generated text, and large tables: not the prose and code the model is to learn.
_EXCLUDED = frozenset(
    {
        *("__pycache__", "encodings", "ensurepip", "entities.py", "idle_test", "idlelib", "lib-dynload"),
        *("dist-packages", "pydoc_data", "site-packages", "test", "tests"),
    }
)


def load_corpus() -> tuple[Bytes, Bytes]:
    """Return the training bytes and the held-out bytes.

    The text is the `.py` files of the running Python's standard library, in the order of their paths; the
    modules `HELD_OUT`, about 5 % of the bytes, make up the held-out text. Both differ a little between
    Python versions, and so do scores on them: the stored weights were trained on the text of 3.11. Every
    held-out module exists in 3.11, 3.12 and 3.13.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train: list[bytes] = []
    held_out: list[bytes] = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        # The build's own configuration (`_sysconfigdata_*.py`, `config-3.*`) describes one machine.
        if not _EXCLUDED.isdisjoint(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        module = parts[0].removesuffix(".py")
        (held_out if module in HELD_OUT else train).append(path.read_bytes())
    if not train or not held_out:
        raise FileNotFoundError(f"no source text of the standard library under {root}")
    return _join(train), _join(held_out)


def _join(texts: list[bytes]) -> Bytes:
    return np.frombuffer(b"\n\n".join(texts), dtype=np.uint8)


def batches(data: Bytes, rng: np.random.Generator, batch: int, length: int) -> Iterator[Tokens]:
    """Yield, without end, token arrays [batch, length] of windows drawn at random from `data`."""
    offsets = np.arange(length)
    while True:
        starts = rng.integers(0, data.size - length + 1, size=(batch, 1))
        yield data[starts + offsets].astype(np.int32)


def eval_batches(data: Bytes, batch: int, length: int) -> Iterator[Tokens]:
    """Yield token arrays [batch, length] of the adjacent windows of `data`, dropping the incomplete end."""
    count = data.size // (batch * length)
    windows = data[: count * batch * length].reshape(count, batch, length)
    for tokens in windows:
        yield tokens.astype(np.int32)


def bits_per_byte(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the mean cross-entropy, in bits, of each byte of `tokens` [batch, length] but the first."""
    log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    taken = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)
    return -taken.mean() / jnp.log(2.0)


def save_weights(path: str | Path, params: Mapping[str, Any]) -> None:
    """Store `params` as float16 in the npz file `path`, whole or not at all.

    Float16 halves the file and is the precision of "the float model" in all scripts: `load_weights` gives
    the stored values back as float32.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(value, dtype=np.float16) for name, value in flatten_dict(params, sep="/").items()}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **arrays)
        os.chmod(temporary, 0o644)  # mkstemp's file is private to its owner
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_weights(path: str | Path = WEIGHTS, config: LMConfig = LMConfig()) -> Params:
    """Return the parameters of `LM(config)` stored in `path`, as float32.

    Raises FileNotFoundError when there is no such file and ValueError when it holds another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: make them with scripts/bench/train_lm.py")
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    expected = jax.eval_shape(LM(config).init, jax.random.key(0), tokens)["params"]
    shapes = {name: leaf.shape for name, leaf in flatten_dict(expected, sep="/").items()}
    with np.load(path) as file:
        arrays = {name: file[name].astype(np.float32) for name in file.files}
    if arrays.keys() != shapes.keys():
        raise ValueError(
            f"{path} is not of this model: it lacks {sorted(shapes.keys() - arrays.keys())} "
            f"and has in excess {sorted(arrays.keys() - shapes.keys())}"
        )
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {arrays[name].shape}, the model needs {shape}")
    return unflatten_dict({name: jnp.asarray(array) for name, array in arrays.items()}, sep="/")


def generate(
    apply_fn: ApplyFn,
    variables: Any,
    prompt: bytes,
    n: int,
    temperature: float = 0.8,
    rng: jax.Array | None = None,
    window: int = 256,
) -> bytes:
    """Sample `n` bytes that continue `prompt`; temperature 0 takes the likeliest byte.

    The model always sees one window of `window` tokens, so that a single compiled step serves the whole
    text: a shorter text is padded at its right, which a causal model cannot see, and a longer one is rolled
    out at its left.
    """
    if not prompt:
        raise ValueError("the prompt is empty: the model continues a text of at least one byte")
    rng = jax.random.key(0) if rng is None else rng

    @jax.jit
    def step(
        variables: Any, tokens: jax.Array, filled: jax.Array, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = apply_fn(variables, tokens[None])[0, filled - 1]
        if temperature == 0:
            byte = jnp.argmax(logits)
        else:
            byte = jax.random.categorical(rng, logits / temperature)
        byte = byte.astype(tokens.dtype)
        full = filled == window
        tokens = jnp.where(full, jnp.roll(tokens, -1), tokens)
        filled = jnp.where(full, window, filled + 1)
        return tokens.at[filled - 1].set(byte), filled, byte

    seen = np.frombuffer(prompt[-window:], dtype=np.uint8).astype(np.int32)
    tokens = jnp.zeros(window, jnp.int32).at[: seen.size].set(seen)
    filled = jnp.int32(seen.size)
    sampled = bytearray()
    for key in jax.random.split(rng, n):
        tokens, filled, byte = step(variables, tokens, filled, key)
        sampled.append(int(byte))
    return bytes(sampled)
