#!/usr/bin/env python3
"""Trains the demo's language model: a small Llama over bytes, on licence texts.

The architecture and the tensor names are Llama's (RMSNorm, rotary embedding in halves, grouped-query attention,
SwiGLU, tied input and output embedding), so that nothing about the demo is special to attnd. A token is a byte.
The weights kept are an exponential moving average, taken at the evaluation with the lowest validation loss; the
held-out licence of corpus/heldout.txt is only measured: no checkpoint is chosen by it.

Writes, into --out:
    model.safetensors    bfloat16 weights, the configuration as JSON in the header's metadata
    reference.npz        logits and a greedy continuation in float64, which demo/tests compares the numpy model with
    train.log            what is printed

Takes about two minutes on one H100:

    python demo/train.py --out demo
"""

import argparse
import json
import lzma
import math
import pathlib
import sys
import time

import numpy
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

DEMO = pathlib.Path(__file__).parent
VALIDATION_BLOCK = 4096  # one block of this many bytes in every VALIDATION_EVERY validates
VALIDATION_EVERY = 25
REFERENCE_PROMPT = b"This License applies to any program or other work which contains a notice placed by the"
REFERENCE_NEW_TOKENS = 64


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight


def rotate(x, cosine, sine):
    """Rotary embedding of x [batch, heads, tokens, head_dim]; element i pairs with element i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.head_dim = config["hidden_size"], config["head_dim"]
        self.heads_q, self.heads_kv = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(width, self.heads_q * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.heads_kv * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.heads_kv * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads_q * self.head_dim, width, bias=False)

    def forward(self, x, cosine, sine):
        batch, tokens, _ = x.shape
        q = self.q_proj(x).view(batch, tokens, self.heads_q, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, tokens, self.heads_kv, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, self.heads_kv, self.head_dim).transpose(1, 2)
        out = functional.scaled_dot_product_attention(rotate(q, cosine, sine), rotate(k, cosine, sine), v,
                                                      is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        width, hidden = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config, dropout):
        super().__init__()
        self.input_layernorm = Norm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = Mlp(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cosine, sine):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cosine, sine))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Body(nn.Module):
    def __init__(self, config, dropout):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config["num_hidden_layers"]))
        self.norm = Norm(config["hidden_size"], config["rms_norm_eps"])


class Llama(nn.Module):
    """Logits [batch, tokens, vocab] of tokens [batch, tokens]; each sequence starts at position 0."""

    def __init__(self, config, dropout=0.0):
        super().__init__()
        self.config = config
        self.model = Body(config, dropout)
        self.dropout = nn.Dropout(dropout)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * config["num_hidden_layers"]) if deep else 1))

    def forward(self, tokens):
        x = self.dropout(self.model.embed_tokens(tokens))
        cosine, sine = self.rotation(tokens.shape[1], x.device, x.dtype)
        for layer in self.model.layers:
            x = layer(x, cosine, sine)
        return self.model.norm(x) @ self.model.embed_tokens.weight.T

    def rotation(self, tokens, device, dtype):
        half = self.config["head_dim"] // 2
        frequency = self.config["rope_theta"] ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
        angle = torch.arange(tokens, device=device, dtype=torch.float64)[:, None] * frequency
        return angle.cos().to(dtype), angle.sin().to(dtype)


class Log:
    """Prints, and keeps what it printed for train.log."""

    def __init__(self):
        self.lines = []

    def __call__(self, line):
        print(line, flush=True)
        self.lines.append(line)


def load_corpus(device):
    """(train, validation [n, VALIDATION_BLOCK], held out), as byte tokens."""
    text = numpy.frombuffer(lzma.decompress((DEMO / "corpus/train.txt.xz").read_bytes()), numpy.uint8)
    blocks = [text[i:i + VALIDATION_BLOCK] for i in range(0, len(text) - VALIDATION_BLOCK, VALIDATION_BLOCK)]
    chosen = VALIDATION_EVERY // 2
    validation = numpy.stack(blocks[chosen::VALIDATION_EVERY])
    train = numpy.concatenate([block for i, block in enumerate(blocks) if i % VALIDATION_EVERY != chosen])
    held_out = numpy.frombuffer((DEMO / "corpus/heldout.txt").read_bytes(), numpy.uint8)
    return [torch.from_numpy(part.astype(numpy.int64)).to(device) for part in (train, validation, held_out)]


def windows(tokens, context):
    """Non-overlapping windows [n, context + 1] of a text; the rest at the end is dropped."""
    count = (tokens.numel() - 1) // context
    return torch.stack([tokens.flatten()[i * context:(i + 1) * context + 1] for i in range(count)])


@torch.no_grad()
def mean_loss(model, text):
    """Mean loss in nats a byte over windows [n, context + 1]."""
    model.eval()
    losses = [functional.cross_entropy(model(part[:, :-1]).flatten(0, 1).float(), part[:, 1:].flatten())
              for part in text.split(8)]
    sizes = [len(part) for part in text.split(8)]
    model.train()
    return sum(loss.item() * size for loss, size in zip(losses, sizes)) / sum(sizes)


@torch.no_grad()
def greedy(model, prompt, count):
    tokens = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens[0, len(prompt):].tolist()


def learning_rate(step, arguments):
    """Linear warm-up, then a cosine down to a tenth."""
    if step < arguments.warmup:
        return arguments.lr * (step + 1) / arguments.warmup
    progress = (step - arguments.warmup) / max(1, arguments.steps - arguments.warmup)
    return arguments.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, arguments):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": arguments.weight_decay},
                              {"params": vectors, "weight_decay": 0.0}], lr=arguments.lr, betas=(0.9, 0.95))


def train(model, average, texts, arguments, log):
    """Runs the steps; returns the averaged weights with the lowest validation loss."""
    text, validation, held_out = texts
    device = text.device
    generator = torch.Generator().manual_seed(arguments.seed)
    optimizer = make_optimizer(model, arguments)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    best, best_loss, running, start = None, math.inf, 0.0, time.time()
    offsets = torch.arange(arguments.context + 1, device=device)
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments)
        starts = torch.randint(len(text) - arguments.context - 1, (arguments.batch, 1), generator=generator)
        batch = text[starts.to(device) + offsets]
        with mixed:
            logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(arguments.average, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if (step + 1) % arguments.evaluate == 0 or step + 1 == arguments.steps:
            running, valid = loss.item(), mean_loss(average, validation)
            log(f"step {step + 1:5d}  train {running:.4f}  validation {valid:.4f}  held out "
                f"{mean_loss(average, held_out):.4f}  lr {learning_rate(step, arguments):.2e}  "
                f"{time.time() - start:.0f} s")
            if valid < best_loss:
                best, best_loss = {k: v.clone() for k, v in average.state_dict().items()}, valid
            elif valid > best_loss * 1.05:
                log("validation loss rises: stopping")
                break
    return best


def save(model, held_out, arguments, log):
    """Rounds the weights to bfloat16 and writes model.safetensors and reference.npz."""
    weights = {name: tensor.to(torch.bfloat16).cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(weights, arguments.out / "model.safetensors",
                                metadata={"config": json.dumps(model.config)})
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    loss = mean_loss(model, held_out)
    log(f"rounded to bfloat16: held out {loss:.4f} nats a byte, perplexity {math.exp(loss):.3f} a byte")

    exact = model.double().cpu().eval()
    with torch.no_grad():
        logits = exact(torch.tensor([list(REFERENCE_PROMPT)]))[0].numpy()
    continuation = greedy(exact, REFERENCE_PROMPT, REFERENCE_NEW_TOKENS)
    numpy.savez_compressed(arguments.out / "reference.npz", prompt=numpy.frombuffer(REFERENCE_PROMPT, numpy.uint8),
                           logits=logits.astype(numpy.float32), continuation=numpy.array(continuation, numpy.uint8))
    log(f"sample: {REFERENCE_PROMPT.decode()}[{bytes(continuation).decode('ascii', 'replace')}]")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256, help="hidden size")
    parser.add_argument("--heads-q", type=int, default=8)
    parser.add_argument("--heads-kv", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=576, help="inner size of the MLP")
    parser.add_argument("--context", type=int, default=1024, help="bytes in a training sequence")
    parser.add_argument("--batch", type=int, default=48, help="sequences in a step")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--average", type=float, default=0.99, help="decay of the averaged weights")
    parser.add_argument("--evaluate", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    config = {"architecture": "llama", "vocab_size": 256, "hidden_size": arguments.width,
              "intermediate_size": arguments.hidden, "num_hidden_layers": arguments.layers,
              "num_attention_heads": arguments.heads_q, "num_key_value_heads": arguments.heads_kv,
              "head_dim": arguments.head_dim, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "max_position_embeddings": arguments.context, "tie_word_embeddings": True}
    log = Log()
    log(f"train.py {' '.join(sys.argv[1:])}")
    log(f"torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if arguments.device == 'cuda' else arguments.device}")
    model = Llama(config, arguments.dropout).to(arguments.device)
    average = Llama(config).to(arguments.device)
    average.load_state_dict(model.state_dict())
    text, validation, held_out = load_corpus(arguments.device)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(text):,} bytes to train on, "
        f"{validation.numel():,} to validate, {held_out.numel():,} held out")
    texts = (text, torch.cat([windows(block, arguments.context) for block in validation]),
             windows(held_out, arguments.context))
    average.load_state_dict(train(model, average, texts, arguments, log))
    save(average, texts[2], arguments, log)
    (arguments.out / "train.log").write_text("\n".join(log.lines) + "\n")


if __name__ == "__main__":
    main()
