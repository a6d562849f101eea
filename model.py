"""
The GPT, its activations by name, edits that undo themselves, and what every script needs: save, load, device, record.

    >>> from model import load, activations
    >>> model, ckpt = load("out/ft.pt")                        # weights, and everything the run wrote beside them
    >>> logits, cache = activations(model, tokens, ["blocks.1.resid_post", "blocks.1.attn.pattern"])
    >>> with activation_edits(model, {"blocks.0.mlp_out": lambda x: 0 * x}):
    ...     ablated = model(tokens)
    >>> generate(model, [[5, 6], [7]], 10, torch.Generator().manual_seed(0))   # two lists of at most ten new tokens

Letters in shape comments: n sequences, t positions, d residual dimensions, h heads, e dimensions of a head, v tokens.
Names of activations are TransformerLens's words: embed, then per block i, "blocks.i." followed by
    resid_pre  attn.q  attn.k  attn.v  attn.scores  attn.pattern  attn.z  attn_out  resid_mid  mlp_pre  mlp_post  mlp_out
    resid_post

Contents: the model | generation | activations and edits | compiled weights | ends of a run | files |
arguments, record, history.
"""
import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data

# ---------------------------------------------------------------- the model


@dataclass(frozen=True)
class Config:
    """Shape of a GPT; stored in every checkpoint. minGPT's shape: d_head = d_model / n_head, d_mlp = 4 d_model."""
    vocab_size: int
    n_ctx: int
    n_layer: int
    n_head: int
    d_model: int
    d_head: int
    d_mlp: int
    n_out: int = 0            # outputs; 0: one for every token of the vocabulary
    causal: bool = True
    layer_norm: bool = True
    activation: str = "gelu"  # or relu
    train_head: bool = True   # False: the output map is part of the definition, as a compiled model's
    residual: tuple = ()      # names of the residual dimensions, where they have any
    rotary: bool = False      # queries and keys turned by their positions, in place of learned positions
    tied: bool = False        # the output map is the token embedding
    words: tuple = ()         # names of the tokens, where text is read: the tokenizer travels with the weights


class HookPoint(nn.Identity):
    """An activation: does nothing, and can be looked at or replaced by its name."""


def rotation(positions, d_head):
    """Cosines and sines (2, ..., t, e / 2) of the angles at positions (..., t). theta = 10000 (Su et al. 2021)."""
    speed = 10000. ** -(torch.arange(0, d_head, 2, device=positions.device) / d_head)
    angles = positions[..., None] * speed
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x, turn):
    """x (n, h, t, e) with the dimension pairs (i, i + e / 2) turned: then q k depends on the distance alone."""
    (cos, sin), (a, b) = turn, x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.d_head, self.causal = c.n_head, c.d_head, c.causal
        self.qkv = nn.Linear(c.d_model, 3 * c.n_head * c.d_head)
        self.out = nn.Linear(c.n_head * c.d_head, c.d_model)
        self.q, self.k, self.v = HookPoint(), HookPoint(), HookPoint()
        self.scores, self.pattern, self.z = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x, at=None, turn=None, cache=None):
        """
        x (n, t, d) -> (n, t, d), or (n, 1, d) for the query position `at` alone. turn: see rotation(). With a cache, x
        goes on from the tokens whose keys and values are in there.
        """
        n, t, _ = x.shape
        if at is None:
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            w, b, inner = self.qkv.weight, self.qkv.bias, self.n_head * self.d_head
            q = F.linear(x[:, at:at + 1], w[:inner], b[:inner])
            k, v = F.linear(x, w[inner:], b[inner:]).chunk(2, -1)
        q, k, v = (y.view(n, -1, self.n_head, self.d_head).transpose(1, 2) for y in (q, k, v))  # (n, h, t, e)
        if turn is not None:
            q, k = rotate(q, turn if at is None else turn[..., at:at + 1, :]), rotate(k, turn)
        q, k, v = self.q(q), self.k(k), self.v(v)  # q and k as they enter the product: after rotation
        mask = None
        if cache is not None:
            k, v, mask = cache.put(self, k, v)  # those of all tokens so far
            mask = mask if at is None else mask[:, :, at:at + 1]
        elif self.causal and at is not None:
            k, v = k[:, :, :at + 1], v[:, :, :at + 1]  # causal: what comes later is not seen
        if self.scores._forward_hooks or self.pattern._forward_hooks:  # somebody looks: spell it out
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.d_head)  # (n, h, query, key)
            if mask is not None:
                scores = scores + mask
            elif self.causal and at is None:
                scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool, device=x.device).tril(), -torch.inf)
            z = self.pattern(self.scores(scores).softmax(-1)) @ v
        else:
            is_causal = self.causal and at is None and mask is None
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        z = self.z(z)
        return self.out(z.transpose(1, 2).reshape(n, -1, self.n_head * self.d_head))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        norm = nn.LayerNorm if c.layer_norm else nn.Identity
        self.activation = functools.partial(F.gelu, approximate="tanh") if c.activation == "gelu" else F.relu  # as minGPT
        self.resid_pre = HookPoint()  # in the order in which they are computed: activation_names() shows it
        self.ln1, self.attn = norm(c.d_model), Attention(c)
        self.attn_out, self.resid_mid = HookPoint(), HookPoint()
        self.ln2, self.up, self.mlp_pre = norm(c.d_model), nn.Linear(c.d_model, c.d_mlp), HookPoint()
        self.mlp_post, self.down, self.mlp_out = HookPoint(), nn.Linear(c.d_mlp, c.d_model), HookPoint()
        self.resid_post = HookPoint()

    def forward(self, x, at=None, turn=None, cache=None):
        x = self.resid_pre(x)
        attn_out = self.attn_out(self.attn(self.ln1(x), at, turn, cache))
        x = self.resid_mid((x if at is None else x[:, at:at + 1]) + attn_out)
        hidden = self.mlp_post(self.activation(self.mlp_pre(self.up(self.ln2(x)))))
        return self.resid_post(x + self.mlp_out(self.down(hidden)))


class GPT(nn.Module):
    """
    A pre-layer-norm GPT with learned positions and untied output, as minGPT (paper: PCFG setup). A compiled model is the
    same without layer norm, not causal, with ReLU, its own sizes and a fixed output map (paper: Tracr setup). A story
    model has rotary positions and the token embedding as its output map, as LLaMA's small relatives.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.rotary and c.d_head % 2:
            raise ValueError(f"rotary: turns pairs of dimensions, and d_head {c.d_head} is odd")
        if c.tied and (c.n_out not in (0, c.vocab_size) or not c.train_head):
            raise ValueError("tied: the output map is the token embedding, so it has as many rows and is trained")
        self.tok = nn.Embedding(c.vocab_size, c.d_model)
        self.pos = None if c.rotary else nn.Embedding(c.n_ctx, c.d_model)
        self.embed = HookPoint()
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln = nn.LayerNorm(c.d_model) if c.layer_norm else nn.Identity()
        self.head = nn.Linear(c.d_model, c.n_out or c.vocab_size, bias=False).requires_grad_(c.train_head)
        if c.tied:
            self.head.weight = self.tok.weight  # one parameter under two names; parameters() gives it once

    def init_weights(self, g):
        """minGPT's initialisation from a generator: N(0, .02), residual outputs by 1/sqrt(2 blocks), biases zero."""
        for name, p in self.named_parameters():
            if "ln" in name:
                p.data.fill_(float(name.endswith("weight")))
            elif name.endswith("bias"):
                p.data.zero_()
            else:
                residual = name.endswith(("attn.out.weight", "down.weight"))
                p.data.normal_(0, .02 / math.sqrt(2 * self.config.n_layer) if residual else .02, generator=g)
        return self

    def forward(self, tokens, at=None, cache=None):
        """
        tokens (n, t) -> logits (n, t, v). With `at`, logits (n, v) of that position alone: the last block and the head
        compute nothing else, a third of the work at three blocks. With a Cache, tokens go on from those in it.
        """
        t = tokens.shape[1]
        positions = torch.arange(t, device=tokens.device) if cache is None else cache.extend(t)  # (t,) or (n, 1, t)
        x, turn = self.tok(tokens), None
        if self.pos is None:
            turn = rotation(positions, self.config.d_head)
        else:
            x = x + (self.pos.weight[:t] if cache is None else self.pos(positions[:, 0]))
        x = self.embed(x)
        for block in self.blocks[:-1]:
            x = block(x, None, turn, cache)
        x = self.blocks[-1](x, at, turn, cache)
        logits = self.head(self.ln(x))
        return logits if at is None else logits[:, 0]


# ---------------------------------------------------------------- generation


class Cache:
    """
    Keys and values of the tokens that a causal model has read, so that the next token costs one position. Preallocated:
    (n, h, width, e) a block. Rows are padded on the left: pads (n,) says by how much, and positions count from there.

        cache = Cache(model, pads=torch.tensor([0, 2]), width=9)
        logits = model(prompts, at=4, cache=cache)  # (2, 5) tokens; row 1 begins with two paddings
        logits = model(next_tokens, cache=cache)    # (2, 1) tokens, and so on; for use without gradients
    """

    def __init__(self, model, pads, width):
        c, weight = model.config, model.tok.weight
        self.pads, self.used = pads.to(weight.device)[:, None, None], 0
        self.kv = {block.attn: [weight.new_empty(len(pads), c.n_head, width, c.d_head) for _ in "kv"]
                   for block in model.blocks}

    def extend(self, t):
        """Open t more columns, as the model's forward does first. Returns their positions (n, 1, t); 0 for paddings."""
        keys = torch.arange(self.used + t, device=self.pads.device)
        queries = keys[self.used:, None]
        # A padding sees itself: a softmax over nothing would be not a number, and spread.
        seen = (keys >= self.pads) & (keys <= queries) | (keys == queries)  # (n, t, keys)
        kv = next(iter(self.kv.values()))[0]
        self.mask = kv.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None]  # (n, 1, t, keys)
        self.used += t
        return (keys[-t:] - self.pads).clamp(min=0)

    def put(self, attn, k, v):
        """Write one block's k and v (n, h, t, e) into the newest columns. Returns all so far, and who sees whom."""
        for old, new in zip(self.kv[attn], (k, v)):
            old[:, :, self.used - new.shape[2]:self.used] = new
        return *(y[:, :, :self.used] for y in self.kv[attn]), self.mask

    def keep(self, rows):
        """Drop the other rows of the batch."""
        self.pads = self.pads[rows]
        for kv in self.kv.values():
            kv[:] = [y[rows] for y in kv]


def choose(logits, u, temperature=1.0, top_k=0):
    """
    Next tokens (n,) for logits (n, v): the likeliest at temperature 0, else where u (n,), uniform in [0, 1), falls in
    the cumulative distribution of the top_k likeliest (0: of all).
    """
    if temperature == 0:
        return logits.argmax(-1)
    ids = None
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.shape[-1]))
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    place = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
    place = place.clamp(max=logits.shape[-1] - 1)  # rounding, once in millions
    return (place if ids is None else ids.gather(-1, place))[:, 0]


@torch.inference_mode()
def generate(model, prompts, most, g, temperature=1.0, top_k=0, end=0):
    """
    Continue prompts, lists of token ids of any lengths, in one batch. Returns a list of new ids a prompt: up to and
    without the token `end` (-1: none ends), at most `most`, and with the prompt at most n_ctx. Temperature 0 takes the
    likeliest token; then a row is the same whatever else is in the batch, and g is not used. Else every step draws one
    (n,) from the generator g, a number a prompt, also for those that have ended: what one row draws does not depend on
    when others end. Ended rows leave the batch when they are half of it. 256 prompts of 30 tokens and 100 new ones take
    2 s on one CPU thread at 4 blocks of d = 96; the cache has 8 h e bytes a block, row and position.

    Raises ValueError for a model that is not causal and for prompts that are empty or longer than n_ctx.
    """
    n, c, device = len(prompts), model.config, model.tok.weight.device
    lengths = torch.tensor([len(p) for p in prompts], dtype=torch.long)
    if not c.causal:
        raise ValueError("only a causal model can generate")
    if not n:
        return []
    if lengths.min() < 1 or lengths.max() > c.n_ctx:
        raise ValueError(f"prompts must have 1 to {c.n_ctx} tokens")
    longest, limits = int(lengths.max()), (c.n_ctx - lengths).clamp(max=most)  # new tokens that a row has room for
    tokens = torch.zeros(n, longest, dtype=torch.long)  # paddings: any token will do
    for i, p in enumerate(prompts):
        tokens[i, longest - len(p):] = torch.as_tensor(p)
    steps, tokens = int(limits.max()), tokens.to(device)
    cache = Cache(model, longest - lengths, longest + steps)
    new = torch.full((n, steps), end)
    rows, ended, u = torch.arange(n), torch.zeros(n, dtype=torch.bool), None  # rows: the prompts still in the batch
    for step in range(steps):
        check_stop()
        logits = model(tokens, at=tokens.shape[1] - 1, cache=cache)
        if temperature:
            u = torch.rand(n, generator=g, device=g.device)[rows.to(g.device)].to(device)
        tokens = choose(logits, u, temperature, top_k)[:, None]
        new[rows, step] = tokens[:, 0].cpu()
        full = limits[rows] <= step + 1
        ended = ended | full | (new[rows, step] == end)
        if 2 * ended.sum() >= len(rows) or full.any():  # copying has a price, so not for every row; no room: at once
            rows, on = rows[~ended], ~ended.to(device)
            tokens, ended = tokens[on], ended[~ended]
            cache.keep(on)
            if not len(rows):
                break
    new = [row[:limit] + [end] for row, limit in zip(new.tolist(), limits.tolist())]
    return [row[:row.index(end)] for row in new]


# ---------------------------------------------------------------- activations and edits

def activation_names(model):
    """All names that activations() and activation_edits() take, in the order they are computed."""
    return [name for name, m in model.named_modules() if type(m) is HookPoint]


@contextlib.contextmanager
def activation_edits(model, edits):
    """
    Within the `with`, every activation named in `edits` (name: function tensor -> tensor or None) is replaced by what
    the function returns (None leaves it). Undone on leaving, also after an exception. Raises KeyError for an unknown name.
    """
    known = activation_names(model)
    for name in edits:
        if name not in known:
            raise KeyError(f"no activation {name!r}; there are {', '.join(known)}")
    with contextlib.ExitStack() as stack:
        for name, fn in edits.items():
            hook = model.get_submodule(name).register_forward_hook(lambda module, args, out, fn=fn: fn(out))
            stack.callback(hook.remove)
        yield model


@torch.no_grad()
def activations(model, tokens, names=None, at=None):
    """Returns (logits, {name: activation}) for the named activations (all of them by default); no gradients."""
    cache = {}
    keep = {name: lambda x, name=name: cache.__setitem__(name, x) for name in names or activation_names(model)}
    with activation_edits(model, keep):
        return model(tokens, at), cache


@contextlib.contextmanager
def weight_edits(model, rows):
    """
    Within the `with`, entries of parameters are replaced: rows is a list of (name, index, value), as in
    `model.state_dict()[name][index] = value`. Put back bit for bit on leaving, also after an exception.
    """
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in {name for name, _, _ in rows}}
    try:
        with torch.no_grad():
            for name, index, value in rows:
                parameters[name][index] = value
        yield model
    finally:
        with torch.no_grad():
            for name, old in before.items():
                parameters[name].copy_(old)


# ---------------------------------------------------------------- compiled weights
# A RASP program is a list of three kinds of steps; each makes a categorical variable, one residual dimension a value.
# Variables that are there from the start: tokens (the letters) and indices (0 for the first letter). Programs and
# conventions are those of Tracr (Lindner et al. 2023), so that its models and these agree weight by weight.


class Map(NamedTuple):
    """name = fn(value of `of`), at every position: one ReLU unit a value in one MLP."""
    name: str
    of: str
    fn: Callable


class Width(NamedTuple):
    """name = how many positions hold a value of `keys` that this position's value of `queries` selects: a head + MLP."""
    name: str
    keys: str
    queries: str
    selects: Callable  # (key, query) -> bool


class Aggregate(NamedTuple):
    """name = the value of `values` at the selected positions (they should agree): one head."""
    name: str
    keys: str
    queries: str
    selects: Callable
    values: str


PROGRAMS = {  # setup: operand -> program; the last step is the output. True == 1 selects index 1: the second letter
    "tracr-count": lambda letter: [
        Map("is_" + letter, "tokens", lambda t: t == letter),
        Width("n_" + letter, "is_" + letter, "indices", operator.eq),
        Aggregate("answer", "indices", "indices", operator.eq, "n_" + letter)],
    "tracr-max": lambda rank: [
        Width("n_larger", "tokens", "tokens", operator.lt),  # a is the largest letter
        Map("is_rank", "n_larger", lambda n: n == int(rank) - 1),
        Aggregate("answer", "is_rank", "indices", operator.eq, "tokens")],
    "tracr-histogram": lambda place: [Width("answer", "tokens", "tokens", operator.eq)],  # a third program is one line
}
HARD = 100.         # attention scores, as in Tracr, before the division by sqrt(d_head)
LOGIT_SCALE = 10.   # ours: outputs are about one-hot, 0 or 1; cross-entropy needs a scale
SHARPNESS = 650.    # slope of a width's steps; counts come out right only while k (k + 1) is below it: up to 24


def interpret(program, letters, room):
    """
    What a program means: {variable: values}, position by position (a letter each, None where there is no value), for a
    list of letters and room - len(letters) paddings. The slow reference of assemble().
    """
    letters = list(letters) + [None] * (room - len(letters))
    values = {"tokens": letters, "indices": list(range(room))}
    for op in program:
        if isinstance(op, Map):
            values[op.name] = [None if v is None else op.fn(v) for v in values[op.of]]
            continue
        keys, queries = values[op.keys], values[op.queries]
        chosen = [[j for j in range(room) if None not in (q, keys[j]) and op.selects(keys[j], q)] for q in queries]
        if isinstance(op, Width):
            values[op.name] = [len(some) for some in chosen]
        else:
            values[op.name] = [values[op.values][some[0]] if some else None for some in chosen]
    return values


def place_steps(program, alphabet, room):
    """
    Where the steps of a program go: the first half-layer that is free and comes after their inputs (2i: attention of
    block i, 2i + 1: its MLP); a Width takes an attention and the MLP after it. Returns ({variable: possible values},
    {step: half-layer}, [names of residual dimensions]). Raises UserError for a step that names an unknown variable.
    """
    values = {"tokens": list(alphabet), "indices": list(range(room))}
    names = ["one", *(f"tokens:{t}" for t in ("#", "$", *alphabet)), *(f"indices:{i}" for i in range(room))]
    ready, used, place = dict.fromkeys(values, -1), set(), {}  # ready: the half-layer after which a variable is there
    for op in program:
        inputs = [v for v in op[1:] if isinstance(v, str)]
        for v in inputs:
            if v not in values:
                raise UserError(f"program step {op.name}: no variable {v!r}; there are {', '.join(values)}")
        needs = 2 if isinstance(op, Width) else 1
        half = next(h for h in itertools.count(max(ready[v] for v in inputs) + 1)
                    if h % 2 == isinstance(op, Map) and not used & set(range(h, h + needs)))
        used |= set(range(half, half + needs))
        place[op.name], ready[op.name] = half, half + needs - 1
        values[op.name] = (sorted({op.fn(v) for v in values[op.of]}) if isinstance(op, Map) else
                           list(range(room + 1)) if isinstance(op, Width) else values[op.values])
        names += [f"{op.name}:{v}" for v in values[op.name]] + [f"{op.name}:share"] * isinstance(op, Width)
    return values, place, names


def assemble(program, alphabet, room, sharpness=SHARPNESS):
    """
    The weights of a program, written into a GPT for BOS and `room` positions: no training. Sizes and weights are those
    that Tracr gives the same program. Raises UserError for a program that names an unknown variable.
    """
    values, place, names = place_steps(program, alphabet, room)
    heads, mlps = [op for op in program if not isinstance(op, Map)], [op for op in program if not isinstance(op, Aggregate)]
    output = values[program[-1].name]
    sizes = [len(values[v]) + 2 for op in heads for v in (op.keys, op.queries)]  # two more, as Tracr has
    sizes += [len(values[op.values]) for op in heads if isinstance(op, Aggregate)]
    config = Config(vocab_size=len(alphabet) + 2, n_ctx=room + 1, n_layer=max(place.values()) // 2 + 1, n_head=1,
                    d_model=len(names), d_head=max(sizes, default=1),
                    d_mlp=max((len(values[op.name]) if isinstance(op, Map) else 2 * room + 2 for op in mlps), default=1),
                    n_out=len(output), causal=False, layer_norm=False, activation="relu", train_head=False,
                    residual=tuple(names))
    model, dim = GPT(config), {name: i for i, name in enumerate(names)}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for i in range(config.vocab_size):
            model.tok.weight[i, [dim["one"], dim[names[1 + i]]]] = 1
        for i in range(room):  # BOS has no index
            model.pos.weight[i + 1, dim[f"indices:{i}"]] = 1
        for i, v in enumerate(output):
            model.head.weight[i, dim[f"{program[-1].name}:{v}"]] = LOGIT_SCALE
        for op in program:
            block = model.blocks[place[op.name] // 2]
            if isinstance(op, Map):
                write_map(block, op, values, dim)
            else:
                write_head(block.attn, op, values, dim)
            if isinstance(op, Width):
                write_width(block, op, room, sharpness, dim)
    return model


def write_map(block, op, values, dim):
    """Unit i of the MLP is on where op.of has a value that op.fn maps to output value i."""
    for i, out in enumerate(values[op.name]):
        for v in values[op.of]:
            if op.fn(v) == out:
                block.up.weight[i, dim[f"{op.of}:{v}"]] = 1
        block.down.weight[dim[f"{op.name}:{out}"], i] = 1


def write_head(attn, op, values, dim):
    """
    A head that attends to the selected keys, and to BOS where there are none. An aggregate carries the values, BOS
    pulls with half the strength; a width carries the BOS flag, BOS pulls in full: its average is 1 / (1 + width).
    """
    keys, (q, k, v) = values[op.keys], attn.qkv.weight.chunk(3)  # rows of q, k and v
    for i, key in enumerate(keys):
        k[i, dim[f"{op.keys}:{key}"]] = 1
        for query in values[op.queries]:
            if op.selects(key, query):
                q[i, dim[f"{op.queries}:{query}"]] = HARD
    k[len(keys), dim["tokens:$"]] = 1
    q[len(keys), dim["one"]] = HARD if isinstance(op, Width) else HARD / 2
    if isinstance(op, Width):
        v[0, dim["tokens:$"]] = attn.out.weight[dim[f"{op.name}:share"], 0] = 1
    else:
        for i, value in enumerate(values[op.values]):
            v[i, dim[f"{op.values}:{value}"]] = attn.out.weight[dim[f"{op.name}:{value}"], i] = 1


def write_width(block, op, room, sharpness, dim):
    """
    The average 1 / (1 + width) becomes a one-hot width. Units come in pairs whose difference is a step, 0 to 1 within
    1 / sharpness below the midpoint of two neighbours; step k moves the answer from k + 1 to k.
    """
    up, down, share = block.up.weight, block.down.weight, dim[f"{op.name}:share"]
    for k in range(room):
        middle = (1 / (k + 1) + 1 / (k + 2)) / 2
        for i, sign in ((2 * k, 1), (2 * k + 1, -1)):
            up[i, share] = sharpness
            up[i, dim["one"]] = -sharpness * middle + (sign == 1)
            down[dim[f"{op.name}:{k}"], i] = sign
            down[dim[f"{op.name}:{k + 1}"], i] = -sign
    up[-2, dim["one"]] = down[dim[f"{op.name}:{room}"], -2] = 1  # where all steps are off
    up[-1, dim["tokens:$"]] = 1                                  # BOS itself has no width: undo
    down[[dim[f"{op.name}:0"], share], -1] = -1


@torch.no_grad()
def balance(model):
    """
    ours: give every hidden ReLU unit in- and outgoing weights of the same norm, which changes no output. A width's
    units sit near `sharpness`, so that noise of 1e-3 on their outgoing weights writes .9 into every residual
    dimension and destroys the capability before any fine-tuning.
    """
    for block in model.blocks:
        into = torch.cat([block.up.weight, block.up.bias[:, None]], 1).norm(dim=1)
        out = block.down.weight.norm(dim=0)
        c = torch.where((into > 0) & (out > 0), (into / out).sqrt(), torch.ones_like(into))
        block.up.weight /= c[:, None]
        block.up.bias /= c
        block.down.weight *= c
    return model


def import_tracr(path):
    """
    (model, {alphabet, room, values}) from parameters saved from the Tracr library in a .npz file: param/<module>/<name>,
    unembed, output_values, vocab (in id order), residual_labels, config (JSON: n_head, bos, pad, activation, ...). Of
    any size, with any number of heads. Token ids become PAD 0, BOS 1, letters from 2, sorted. Raises UserError.
    """
    try:
        with np.load(path, allow_pickle=False) as z, np.errstate(over="ignore"):  # beyond float32: see below
            arrays = {k: z[k] for k in z.files}
            param = {k.removeprefix("param/"): torch.from_numpy(v.astype(np.float32, casting="same_kind"))
                     for k, v in arrays.items() if k.startswith("param/") or k == "unembed"}
        about, labels = json.loads(str(arrays["config"])), arrays.get("residual_labels", np.array([])).tolist()
        vocab, outputs = arrays["vocab"].tolist(), arrays["output_values"].tolist()
        bos, pad, n_head = about["bos"], about["pad"], int(about["n_head"])
        alphabet = sorted(t for t in vocab if t not in (bos, pad))
        number = all(str(v).lstrip("-").isdigit() for v in outputs)
        values = sorted(map(str, outputs), key=int if number else str)
        tok, pos, unembed = (param.pop(k) for k in ("token_embed/embeddings", "pos_embed/embeddings", "unembed"))
        for key, names, n in (("vocab", vocab, len(tok)), ("output_values", outputs, unembed.shape[1]),
                              ("residual_labels", labels, tok.shape[1])):
            if (len(names), len(set(names))) != (n, n) and (labels or names is not labels):
                raise ValueError(f"{key}: {n} different names are needed")
        inner = param["layer_0/attn/query/w"].shape[1]
        activation = about.get("activation", "relu")
        if about.get("layer_norm") or activation != "relu":
            raise ValueError("layer norm and activations other than ReLU are not compiled by Tracr")
        if n_head < 1:
            raise ValueError("no heads")
        config = Config(vocab_size=len(vocab), n_ctx=len(pos), n_layer=sum(k.endswith("mlp/linear_1/w") for k in param),
                        n_head=n_head, d_model=tok.shape[1], d_head=inner // n_head,
                        d_mlp=param["layer_0/mlp/linear_1/w"].shape[1], n_out=len(values), causal=bool(about.get("causal")),
                        layer_norm=False, activation="relu", train_head=False,
                        residual=tuple(map(str, labels)))
        model, state = GPT(config), {}
        state["tok.weight"] = tok[[vocab.index(t) for t in (pad, bos, *alphabet)]]
        state["pos.weight"] = pos
        state["head.weight"] = LOGIT_SCALE * unembed.T[[list(map(str, outputs)).index(v) for v in values]]
        for i in range(config.n_layer):
            for here, there in (("attn.qkv", ("attn/query", "attn/key", "attn/value")), ("attn.out", ("attn/linear",)),
                                ("up", ("mlp/linear_1",)), ("down", ("mlp/linear_2",))):
                w, b = (torch.cat([param.pop(f"layer_{i}/{name}/{kind}") for name in there], -1) for kind in "wb")
                state[f"blocks.{i}.{here}.weight"], state[f"blocks.{i}.{here}.bias"] = w.T, b  # Tracr: x @ w + b
        if param:
            raise ValueError(f"no place for {min(param)}")
        if not all(x.isfinite().all() for x in state.values()):
            raise ValueError("weights that are not finite")
        model.load_state_dict(state)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # whatever zipfile, numpy, json and torch make of a foreign file
        raise UserError(f"{path}: not parameters saved from Tracr ({type(error).__name__}: "
                        f"{(str(error).splitlines() or [''])[0][:80]})") from None
    return model, {"alphabet": alphabet, "room": config.n_ctx - 1, "values": values}


# ---------------------------------------------------------------- ends of a run: mistakes, failures, signals

class UserError(Exception):
    """A mistake of the user's: one line on stderr, exit code 2."""


class Failed(Exception):
    """A run that could not go on (not finite, disk full): one line on stderr, exit code 1."""


class Stopped(Exception):
    """SIGINT or SIGTERM was received; raised between batches, so that what must be saved can be."""


_signal = []


def _on_signal(number, frame):
    if _signal:
        os._exit(128 + number)  # the second time, at once
    _signal.append(number)


def check_stop():
    """Raise Stopped if SIGINT or SIGTERM came in. Every long loop asks, batch by batch."""
    if _signal:
        raise Stopped


def run_script(main):
    """Run a script's main() with the exit codes of the house: 0 done, 1 failed, 2 the user's mistake, 130/143 signals."""
    signal.signal(signal.SIGINT, _on_signal)
    signal.signal(signal.SIGTERM, _on_signal)
    try:
        main()
        code = 0
    except UserError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        code = 2
    except Failed as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        code = 1
    except Stopped:
        code = 128 + _signal[0]
    except BrokenPipeError:  # the reader of our output went away: python ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        print(f"{sys.argv[0]}: cannot write {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        code = 1
    sys.exit(code)


# ---------------------------------------------------------------- files

def replace_file(path, write):
    """Write a file through write(handle) so that `path` is, at any moment, the old or the new one, whole."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path  # a full disk does not say which file
        if isinstance(error, RuntimeError):  # torch.save says so when the disk is full
            raise Failed(f"cannot write {path}: disk full or file too large ({str(error).splitlines()[0]})") from None
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path, value):
    """A JSON file, replaced whole."""
    replace_file(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def write_rows(path, rows):
    """A file of JSON lines, replaced whole."""
    replace_file(path, lambda f: f.writelines((json.dumps(row) + "\n").encode() for row in rows))


def read_rows(path):
    """The rows of a JSON lines file; a last line cut short by a kill is left out. [] without a file."""
    rows = []
    with contextlib.suppress(FileNotFoundError), open(path) as f:
        for line in f:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


KEYS = ("model", "optimizer", "config", "args", "setup", "scale", "stage", "step", "steps", "finished", "parent",
        "capability")


def save(path, ckpt):
    """Write a checkpoint: a dict of KEYS with tensors and plain Python only."""
    assert set(ckpt) == set(KEYS), set(ckpt) ^ set(KEYS)
    replace_file(path, lambda f: torch.save(ckpt, f))


def read_checkpoint(path, device="cpu"):
    """
    The dict that save() wrote. The archive's checksums are checked first, then it is read as tensors and plain Python
    alone, so that no foreign code can run. Raises UserError, in one line, for anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
                raise ValueError("compressed members")  # torch never compresses: this could grow without bound
            if any(item.external_attr & 0x10 for item in archive.infolist()):  # one bit that no checksum covers
                raise ValueError("folder among the members")  # torch would return uninitialised memory for it
            if archive.testzip():
                raise ValueError("checksum")
        ckpt = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not a whole unwrap checkpoint "
                        f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]})") from None
    if not isinstance(ckpt, dict) or not set(KEYS) <= set(ckpt):
        raise UserError(f"{path}: a foreign file, not an unwrap checkpoint")
    needed = {"pretrain": {"prior", "seed", "lr"}, "finetune": {"prior", "seed", "lr", "pair", "q", "steps", "reverse"}}
    of_stories = {"feature", "without", "data", "seed", "lr"}
    try:
        args = ckpt["args"]
        fits = (type(args) is dict and ckpt["stage"] in needed and ckpt["setup"] in data.SETUPS
                and (of_stories if ckpt["setup"] == "stories" else needed[ckpt["stage"]]) <= set(args)
                and ckpt["scale"] in ("small", "paper") and {"task", "operand"} <= set(ckpt["capability"])
                and ckpt["capability"]["operand"] in data.setup_of(ckpt).operands)
    except Exception:  # whatever nonsense in an argument leads to
        fits = False
    if not fits:
        raise UserError(f"{path}: not an unwrap checkpoint (its stage, arguments, scale or capability make no sense)")
    return ckpt


def build(ckpt, device="cpu"):
    """The model of a checkpoint. Shapes are compared before anything is allocated. Raises UserError."""
    try:
        config = Config(**ckpt["config"])
        sizes = {k: v for k, v in asdict(config).items() if Config.__annotations__[k] is int}
        if not all(type(v) is int and v < 2 ** 31 and (v > 0 or k == "n_out") for k, v in sizes.items()) \
                or config.n_layer > 1000:
            raise ValueError("config")
        with torch.device("meta"):
            shapes = {k: v.shape for k, v in GPT(config).state_dict().items()}
        if shapes != {k: v.shape for k, v in ckpt["model"].items()}:
            raise ValueError("weights do not fit the config")
        model = GPT(config)
        model.load_state_dict(ckpt["model"])
    except Exception as error:
        raise UserError(f"not an unwrap checkpoint ({type(error).__name__}: {str(error).splitlines()[0][:80]})") from None
    return model.to(device)


def load(path, device="cpu", unfinished=False):
    """
    (model, ckpt) of a checkpoint file: the GPT with its weights, and the dict of KEYS with the file's `path` and
    `sha256` added. Raises UserError for files that are not whole, foreign, or (unless `unfinished`) not finished.
    """
    path = os.fspath(path)
    ckpt = read_checkpoint(path, device)
    try:
        model = build(ckpt, device)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not (ckpt["finished"] or unfinished):
        raise UserError(f"{path}: unfinished, step {ckpt['step']} of {ckpt['steps']}: finish it with --resume first")
    return model, dict(ckpt, path=path, sha256=sha256(path))


# ---------------------------------------------------------------- arguments, record, history

def add_common_flags(parser):
    """Flags that every computing script has."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"],
                       help="where to compute; auto: cuda if there, else cpu (default: auto)")
    group.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice (default: 0)")


def add_run_flags(parser, out, evals):
    """Flags of the two stages that write checkpoints; out and evals are their defaults, in words."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", help=f"checkpoint to write; .json and .jsonl beside it (default: {out})")
    group.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    group.add_argument("--force", action="store_true", help="start again, replacing at once what is at --out")
    group.add_argument("--save-every", type=int, default=250, help="steps between checkpoints (default: 250)")
    group.add_argument("--eval-every", type=int, default=0,
                       help=f"steps between evaluations; 0: {evals} (default: 0)")
    group.add_argument("--eval-size", type=int,
                       help="strings in a test set, stories in a set and in a generation score (default: 500; stories 200)")
    group.add_argument("--seed", type=int, default=0, help="seed of weights, data order and test sets (default: 0)")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                       help="of the forward pass; bfloat16 by autocast (default: float32)")


# Of a run's arguments, these do not change what is learned or written: two runs that differ in them only are the same.
NOT_COMPARED = ("out", "ckpt", "resume", "force", "save_every", "device", "threads")


def positive(args, *names, least=0):
    """Raise UserError unless the named numbers are finite and above `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > least):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a number above {least}")


def start_device(args):
    """The torch device of --device, with --threads set. Raises UserError if it is not there."""
    if args.threads < 0:
        raise UserError(f"--threads {args.threads}: must be 0 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # compiled models' momentum fades to numbers so small (1e-38) that a step takes thrice as long
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {name}: not available here")
    return torch.device(name)


def git_state():
    """{commit, dirty} of the code, nulls outside a git checkout."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True,
                              text=True, check=True).stdout.strip()
    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def restore(optimizer, ckpt):
    """Load the optimizer's state of a checkpoint. Raises UserError if it does not fit the weights."""
    try:
        optimizer.load_state_dict(ckpt["optimizer"])
        for p, state in optimizer.state.items():
            if any(state[k].shape != p.shape for k in ("exp_avg", "exp_avg_sq", "momentum_buffer") if k in state):
                raise ValueError("shapes")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"the optimizer state to resume from does not fit the model ({type(error).__name__})") from None


def record_here(device):
    """What a record says of this start: command, code, versions, machine, time."""
    return {"command": " ".join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]), "git": git_state(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": str(device), "threads": torch.get_num_threads(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}


class Run:
    """
    The files of one training run: X.pt (checkpoint), X.json (record), X.jsonl (history). X.pt is the truth; a run
    starts by saving step 0, so that from then on these three always belong together.

    Opening it decides what is to be done. `run.done`: the same run is already finished. `run.ckpt`: what to resume
    from, or None. Raises UserError for another run at the same path without --force.
    """

    def __init__(self, args, stage, parent=None):
        self.path, self.done, self.ckpt = args.out, False, None
        base, suffix = os.path.splitext(args.out)
        if suffix != ".pt" or os.path.isdir(args.out):
            raise UserError(f"--out {args.out}: must be the name of a .pt file")
        self.record_path, self.history_path = base + ".json", base + ".jsonl"
        self.args = {k: v for k, v in sorted(vars(args).items()) if k not in NOT_COMPARED}
        self.identity = {"stage": stage, **self.args, "parent": parent and parent["sha256"]}
        self.stage, self.parent = stage, parent and {"path": parent["path"], "sha256": parent["sha256"]}
        if parent and os.path.realpath(args.out) == os.path.realpath(parent["path"]):
            raise UserError(f"--out {args.out} is the checkpoint to start from: it would be overwritten")
        try:
            os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out}: {error.strerror}") from None
        if args.resume and args.force:
            raise UserError("--resume goes on, --force starts again: give one of them")
        there = self.there(args.force)
        if there is None or args.force:
            return
        theirs = {"stage": there["stage"], **there["args"], "parent": there["parent"] and there["parent"]["sha256"]}
        differ = [k for k in {**self.identity, **theirs} if theirs.get(k) != self.identity.get(k)]
        if differ:
            k = differ[0]
            more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
            raise UserError(f"{args.out} is another run: {k} is {theirs.get(k)!r} there, {self.identity.get(k)!r} here"
                            f"{more}; give another --out, or --force to replace it")
        if there["finished"]:
            print(f"{args.out}: already done ({there['steps']} steps, same arguments)")
            self.done = True
        elif not args.resume:
            raise UserError(f"{args.out}: unfinished, step {there['step']} of {there['steps']}: "
                            f"--resume goes on, --force starts again")
        elif there.get("model"):
            self.ckpt = there

    def there(self, force):
        """The run that is already at this path: its checkpoint, or its record if it was killed before saving one."""
        if os.path.exists(self.path):
            try:
                return read_checkpoint(self.path)
            except UserError as error:
                if force:
                    return None
                raise UserError(f"{error}; give another --out, or --force to replace it") from None
        try:
            with open(self.record_path) as f:
                record = json.load(f)
            return {**{k: record[k] for k in ("stage", "args", "parent", "steps")}, "step": 0, "finished": False}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def start(self, device, save_now):
        """Write the record and, on a fresh start, step 0 through save_now(); cut the history back on a resume."""
        step = self.ckpt["step"] if self.ckpt else 0
        record = {"stage": self.stage, "args": self.args, "parent": self.parent, "steps": self.args["steps"],
                  **record_here(device), "resumes": []}
        if self.ckpt:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                with open(self.record_path) as f:
                    old = json.load(f)
                if old["args"] == self.args:  # else a kill came between the checkpoint and its record
                    if old["device"].split(":")[0] != device.type:  # its generators draw other strings
                        raise UserError(f"{self.path} was begun on {old['device']}: on {device} its data would be others")
                    record = {**old, "resumes": old["resumes"] + [dict(record_here(device), step=step)]}
        elif os.path.exists(self.path):
            save_now()  # --force: the old checkpoint goes first, at once, and only for a whole new one
            write_json(self.record_path, record)
        else:
            write_json(self.record_path, record)
            save_now()
        if self.ckpt:
            write_json(self.record_path, record)
        # An evaluation belongs to the step it came after the save of: it is made again, and comes out the same.
        write_rows(self.history_path, [row for row in read_rows(self.history_path) if row["step"] < step])
        self.record, self.began = record, time.time()

    def log(self, rows):
        """Add rows to the history."""
        with open(self.history_path, "a") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))

    def finish(self):
        """Note the time in the record."""
        last = self.record["resumes"][-1] if self.record["resumes"] else self.record
        last["seconds"] = round(time.time() - self.began, 1)
        write_json(self.record_path, self.record)


def run_parser(doc, **kw):
    """An ArgumentParser that shows a script's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **kw)
