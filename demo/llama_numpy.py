"""The demo's language model in numpy, with its attention left to somebody else.

`Llama` computes everything but the attention: embedding, norms, projections, rotary embedding, MLP, logits. Who
attends is an argument of each forward pass, anything with these two methods:

    begin(query_lengths, sequences) -> positions
        A pass is about to run over these sequences, with this many new tokens each; the position of each new token.
    attend(layer, q, k, v) -> out
        Appends k and v [tokens, heads_kv, head_dim] to the sequences' KV caches and attends with q
        [tokens, heads_q, head_dim], causally among the new tokens; out is [tokens, heads_q, head_dim]. Called for
        layer 0, 1, .. in order.

`LocalAttention` is such a one, right here in float64; demo/run.py has the one that calls attnd.
"""

import json
import pathlib
import struct

import ml_dtypes  # noqa: F401  (gives safetensors' numpy side its bfloat16)
import numpy as np
from safetensors.numpy import load_file

MODEL = pathlib.Path(__file__).parent / "model.safetensors"


def read_config(path):
    """The configuration that train.py put into the metadata of the file's header."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(json.loads(file.read(size))["__metadata__"]["config"])


def rms_norm(x, weight, epsilon):
    return x * (1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(epsilon))) * weight


def rotate(x, cosine, sine):
    """Rotary embedding of x [tokens, heads, head_dim]; element i pairs with element i + head_dim / 2."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)


def silu(x):
    return x / (1 + np.exp(-x))


class Llama:
    """The model: float32 weights and arithmetic.

    Attributes: `layers`, `heads_q`, `heads_kv`, `head_dim`, which is the geometry that the attention needs, `context`,
    the longest sequence it was trained for, and `parameters`, how many numbers it has.
    """

    def __init__(self, path=MODEL):
        config = read_config(path)
        weights = {name: tensor.astype(np.float32) for name, tensor in load_file(path).items()}
        self.layers = config["num_hidden_layers"]
        self.heads_q = config["num_attention_heads"]
        self.heads_kv = config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        self.context = config["max_position_embeddings"]
        self.parameters = sum(tensor.size for tensor in weights.values())
        self._epsilon = config["rms_norm_eps"]
        half = self.head_dim // 2
        self._frequency = config["rope_theta"] ** (-np.arange(half, dtype=np.float64) / half)
        self._embedding = weights["model.embed_tokens.weight"]
        self._norm = weights["model.norm.weight"]
        self._layers = [self._gather_layer(weights, f"model.layers.{layer}.") for layer in range(self.layers)]

    @staticmethod
    def _gather_layer(weights, prefix):
        """One layer's weights, ready for `x @ w`; projections of the same input are one matrix."""
        def join(*names):
            return np.ascontiguousarray(np.concatenate([weights[f"{prefix}{name}.weight"] for name in names]).T)

        return {"attention_norm": weights[prefix + "input_layernorm.weight"],
                "qkv": join("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "o": join("self_attn.o_proj"),
                "mlp_norm": weights[prefix + "post_attention_layernorm.weight"],
                "gate_up": join("mlp.gate_proj", "mlp.up_proj"),
                "down": join("mlp.down_proj")}

    def forward(self, tokens, query_lengths, sequences, attention):
        """Logits [tokens, vocab] of the new tokens of some sequences.

        tokens [tokens] are packed sequence by sequence; query_lengths says how many each of `sequences` has.
        """
        positions = attention.begin(query_lengths, sequences)
        angle = positions[:, None, None] * self._frequency
        rotation = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        x = self._embedding[tokens]
        for index, layer in enumerate(self._layers):
            q, k, v = self._project(layer, x, rotation)
            out = attention.attend(index, q, k, v)
            x = x + out.reshape(len(tokens), -1).astype(np.float32) @ layer["o"]
            gate, up = np.split(rms_norm(x, layer["mlp_norm"], self._epsilon) @ layer["gate_up"], 2, axis=-1)
            x = x + (silu(gate) * up) @ layer["down"]
        return rms_norm(x, self._norm, self._epsilon) @ self._embedding.T

    def _project(self, layer, x, rotation):
        """q, k (both rotated) and v of one layer."""
        qkv = rms_norm(x, layer["attention_norm"], self._epsilon) @ layer["qkv"]
        qkv = qkv.reshape(len(x), self.heads_q + 2 * self.heads_kv, self.head_dim)
        q, k, v = np.split(qkv, (self.heads_q, self.heads_q + self.heads_kv), axis=1)
        return rotate(q, *rotation), rotate(k, *rotation), np.ascontiguousarray(v)


class LocalAttention:
    """Attention in float64 over KV caches in this process.

    Arguments: the model whose geometry it has, the number of sequences, the most tokens that one will have.
    """

    def __init__(self, model, sequences, capacity):
        shape = (model.layers, sequences, model.heads_kv, capacity, model.head_dim)
        self._k = np.zeros(shape)
        self._v = np.zeros(shape)
        self._lengths = np.zeros(sequences, dtype=np.int64)
        self._pass = []  # (sequence, position of its first new token, its rows) of the pass under way
        self._last_layer = model.layers - 1

    def begin(self, query_lengths, sequences):
        ends = np.cumsum(query_lengths)
        self._pass = [(sequence, int(self._lengths[sequence]), slice(end - rows, end))
                      for sequence, rows, end in zip(sequences, query_lengths, ends)]
        return np.concatenate([np.arange(start, start + rows.stop - rows.start) for _, start, rows in self._pass])

    def attend(self, layer, q, k, v):
        out = np.empty(q.shape)
        for sequence, start, rows in self._pass:
            end = start + rows.stop - rows.start
            self._k[layer, sequence, :, start:end] = k[rows].swapaxes(0, 1)
            self._v[layer, sequence, :, start:end] = v[rows].swapaxes(0, 1)
            out[rows] = attend_causally(q[rows], self._k[layer, sequence, :, :end], self._v[layer, sequence, :, :end])
            if layer == self._last_layer:
                self._lengths[sequence] = end
        return out


def attend_causally(q, k, v):
    """out [new, heads_q, head_dim] of q [new, heads_q, head_dim]; k and v are [heads_kv, tokens, head_dim].

    The queries belong to the last `new` of the tokens.
    """
    new, heads_q, head_dim = q.shape
    heads_kv, tokens, _ = k.shape
    group = heads_q // heads_kv
    queries = q.astype(np.float64).reshape(new, heads_kv, group, head_dim).transpose(1, 2, 0, 3)
    scores = queries.reshape(heads_kv, group * new, head_dim) @ k.swapaxes(-1, -2)
    scores *= head_dim**-0.5
    # Of the new tokens a query sees those before it and itself; all older ones are visible.
    newest = scores.reshape(heads_kv, group, new, tokens)[..., tokens - new:]
    newest[..., ~np.tri(new, dtype=bool)] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores, out=scores)
    out = weights @ v / weights.sum(axis=-1, keepdims=True)
    return out.reshape(heads_kv, group, new, head_dim).transpose(2, 0, 1, 3).reshape(new, heads_q, head_dim)
