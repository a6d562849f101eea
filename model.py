"""
The GPT and everything that touches weights: activations by name, edits that undo themselves,
generation, RASP programs compiled into weights, checkpoints.

    >>> model, ckpt = load("out/ft.pt")
    >>> logits, cache = activations(model, tokens, ["embed", "blocks.1.attn.pattern"])
    >>> with activation_edits(model, {"blocks.0.mlp_out": lambda x: 0 * x}):
    ...     ablated = model(tokens)
    >>> generate(model, [[5, 6], [7]], 10, rng)  # two lists of tokens

Shapes: n sequences, t positions, d residual dimensions, h heads, e dimensions a head, v tokens.
Activations, as in TransformerLens: embed, then after "blocks.i."
    resid_pre  attn.q  attn.k  attn.v  attn.scores  attn.pattern  attn.z  attn_out  resid_mid
    mlp_pre  mlp_post  mlp_out  resid_post
"""
import collections
import contextlib
import functools
import itertools
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import (Map, SelectorWidth, UserError, check_archive, check_stop, replace_file,
                  sha256)

# ---------------------------------------------------------------- model


@dataclass(frozen=True)
class Config:
    """Shape of a GPT; stored in every checkpoint."""
    vocab_size: int
    n_ctx: int
    n_layer: int
    n_head: int
    d_model: int
    d_head: int
    d_mlp: int
    n_out: int = 0            # 0: vocab_size
    causal: bool = True
    layer_norm: bool = True
    activation: str = "gelu_exact"  # a key of ACTIVATIONS
    train_head: bool = True   # False: a fixed output map
    residual: tuple = ()      # names of residual dimensions, if any
    rotary: bool = False      # instead of learned positions
    tied: bool = False        # the output map is the token embedding
    words: tuple = ()         # of a text model's tokenizer, in id order


class HookPoint(nn.Identity):
    """An activation, to be read or replaced by its name."""


def rotation(positions, d_head):
    """Cosines, sines (2, ..., 1, t, e / 2) of positions (..., t); theta 10000 (Su et al. 2021)."""
    speed = 10000. ** -(torch.arange(0, d_head, 2, device=positions.device) / d_head)
    angles = positions[..., None, :, None] * speed
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x, turn):
    """Rotate dimensions i, i + e / 2 of x (n, h, t, e): q k depends on distance alone."""
    (cos, sin), (a, b) = turn, x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)


def products_are_faster(k):
    """
    Whether two batched products and a softmax attend to keys k (n, h, t, e) faster than SDPA does:
    on a CPU, whose SDPA is made for long sequences, and very slow in bfloat16.
    """
    return k.device.type == "cpu" and k.shape[2] <= (512 if k.dtype == torch.bfloat16 else 64)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.causal = (c.n_head, c.d_head), c.causal
        self.qkv = nn.Linear(c.d_model, 3 * c.n_head * c.d_head)
        self.out = nn.Linear(c.n_head * c.d_head, c.d_model)
        self.q, self.k, self.v, self.scores, self.pattern, self.z = (HookPoint() for _ in range(6))

    def forward(self, x, query, turn=None, cache=None):
        """x (n, t, d) -> (n, queries, d). query: slice of all positions or one; turn: rotation."""
        if query.stop is None:
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            w, b, inner = self.qkv.weight, self.qkv.bias, self.out.in_features
            q = F.linear(x[:, query], w[:inner], b[:inner])
            k, v = F.linear(x, w[inner:], b[inner:]).chunk(2, -1)
        q, k, v = (y.unflatten(2, self.heads).transpose(1, 2) for y in (q, k, v))  # (n, h, t, e)
        if turn is not None:
            q, k = rotate(q, turn[..., query, :]), rotate(k, turn)
        q, k, v, mask = self.q(q), self.k(k), self.v(v), None
        if cache is not None:
            k, v, mask = cache.put(self, k, v)  # of all tokens so far
            mask = mask[:, :, query]
        elif self.causal:  # one query does not see later keys
            k, v = k[:, :, :query.stop], v[:, :, :query.stop]
        is_causal = self.causal and query.stop is None and mask is None
        if self.scores._forward_hooks or self.pattern._forward_hooks or products_are_faster(k):
            scores = q / math.sqrt(q.shape[3]) @ k.mT  # (n, h, query, key)
            if is_causal:
                mask = scores.new_full(scores.shape[2:], -torch.inf).triu(1)
            if mask is not None:
                scores = scores + mask
            z = self.pattern(self.scores(scores).softmax(-1)) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.out(self.z(z).transpose(1, 2).flatten(2))


# ours: exact. On a CPU minGPT's approximation by a tanh, here "gelu", costs four times as much.
ACTIVATIONS = {"gelu_exact": F.gelu, "gelu": functools.partial(F.gelu, approximate="tanh"),
               "relu": F.relu}


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        norm = nn.LayerNorm if c.layer_norm else nn.Identity
        self.activation = ACTIVATIONS[c.activation]
        self.resid_pre = HookPoint()  # in order of computation, for activation_names()
        self.ln1, self.attn = norm(c.d_model), Attention(c)
        self.attn_out, self.resid_mid = HookPoint(), HookPoint()
        self.ln2, self.up = norm(c.d_model), nn.Linear(c.d_model, c.d_mlp)
        self.mlp_pre, self.mlp_post = HookPoint(), HookPoint()
        self.down, self.mlp_out = nn.Linear(c.d_mlp, c.d_model), HookPoint()
        self.resid_post = HookPoint()

    def forward(self, x, query, turn=None, cache=None):
        x = self.resid_pre(x)
        attn_out = self.attn_out(self.attn(self.ln1(x), query, turn, cache))
        x = self.resid_mid(x[:, query] + attn_out)
        hidden = self.mlp_post(self.activation(self.mlp_pre(self.up(self.ln2(x)))))
        return self.resid_post(x + self.mlp_out(self.down(hidden)))


class GPT(nn.Module):
    """
    A pre-layer-norm GPT with learned positions, as minGPT (paper: PCFG setup). Compiled: ReLU, no
    layer norm, no causal mask, fixed output map (paper: Tracr setup). Stories: rotary, tied.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        untied = c.n_out not in (0, c.vocab_size) or not c.train_head
        if c.rotary and c.d_head % 2 or c.tied and untied:
            raise ValueError("rotary: d_head must be even; tied: output as large as input, trained")
        self.tok = nn.Embedding(c.vocab_size, c.d_model)
        self.pos = None if c.rotary else nn.Embedding(c.n_ctx, c.d_model)
        self.embed = HookPoint()
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln = nn.LayerNorm(c.d_model) if c.layer_norm else nn.Identity()
        self.head = nn.Linear(c.d_model, c.n_out or c.vocab_size, bias=False)
        self.head.requires_grad_(c.train_head)
        if c.tied:
            self.head.weight = self.tok.weight  # one parameter under two names

    def init_weights(self, rng):
        """minGPT's initialisation: N(0, .02), residual outputs by 1/sqrt(2 blocks), biases 0."""
        for name, p in self.named_parameters():
            if "ln" in name or name.endswith("bias"):
                p.data.fill_(float(name.endswith("weight")))
            else:
                residual = name.endswith(("attn.out.weight", "down.weight"))
                sd = .02 / math.sqrt(2 * self.config.n_layer) if residual else .02
                p.data.normal_(0, sd, generator=rng)
        return self

    def forward(self, tokens, at=None, cache=None):
        """
        tokens (n, t) -> logits (n, t, v); with `at`, (n, v) of that position: the last block and
        the head compute no other. With a Cache, tokens follow those in it.
        """
        x, t = self.tok(tokens), tokens.shape[1]
        positions = torch.arange(t, device=tokens.device) if cache is None else cache.extend(t)
        turn = rotation(positions, self.config.d_head) if self.config.rotary else None
        x = self.embed(x + self.pos(positions) if turn is None else x)
        for block in self.blocks[:-1]:
            x = block(x, slice(None), turn, cache)
        x = self.blocks[-1](x, slice(None) if at is None else slice(at, at + 1), turn, cache)
        logits = self.head(self.ln(x))
        return logits if at is None else logits[:, 0]


def loss_of(forward, x):
    """
    Mean cross-entropy (nats) of column x.at of Examples x, else of all targets, x.extra once more;
    where x has weights, the mean over rows of a row's weighted sum. forward: the model, or it
    compiled.
    """
    if x.at is not None:
        return F.cross_entropy(forward(x.tokens, x.at).float(), x.target[:, x.at])
    logits = forward(x.tokens)  # gathering the wanted ones would make the host wait for a GPU
    every = logits.flatten(0, 1).float(), x.target.flatten()
    if x.weight is not None:
        losses = F.cross_entropy(*every, ignore_index=-1, reduction="none")
        return losses @ x.weight.flatten() / len(x.tokens)
    loss = F.cross_entropy(*every, ignore_index=-1)
    if x.extra:
        column, weight = x.extra
        loss = loss + weight * F.cross_entropy(logits[:, column].float(), x.target[:, column])
    return loss


@torch.no_grad()
def to_transformer_lens(model):
    """
    (config, state): a GPT of any setup in the words of TransformerLens, up to its version 3 for
    HookedTransformer(config) and load_state_dict(state, strict=False). Logits and activations are
    the same; dimensions of q and k are in another order where positions are rotary.
    """
    c = model.config
    config = dict(
        n_layers=c.n_layer, d_model=c.d_model, n_ctx=c.n_ctx, d_head=c.d_head, n_heads=c.n_head,
        d_mlp=c.d_mlp, d_vocab=c.vocab_size, d_vocab_out=c.n_out or c.vocab_size,
        act_fn={"gelu_exact": "gelu", "gelu": "gelu_new"}.get(c.activation, c.activation),
        attention_dir="causal" if c.causal else "bidirectional",
        normalization_type="LN" if c.layer_norm else None, device=str(model.tok.weight.device))
    state = {"embed.W_E": model.tok.weight, "unembed.W_U": model.head.weight.T,
             "unembed.b_U": torch.zeros(len(model.head.weight))}
    norms, order = {"ln_final": model.ln}, torch.arange(c.d_head)
    if c.rotary:  # there pairs are neighbours, here halves
        config.update(positional_embedding_type="rotary", rotary_dim=c.d_head,
                      rotary_adjacent_pairs=True)
        order = order.view(2, -1).T.flatten()
    else:
        state["pos_embed.W_pos"] = model.pos.weight
    for i, block in enumerate(model.blocks):
        at, heads = f"blocks.{i}.", (c.n_head, c.d_head)
        norms.update({at + "ln1": block.ln1, at + "ln2": block.ln2})
        for x, w, b in zip("QKV", block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)):
            kept = torch.arange(c.d_head) if x == "V" else order
            state[f"{at}attn.W_{x}"] = w.unflatten(0, heads)[:, kept].mT  # (h, d, e)
            state[f"{at}attn.b_{x}"] = b.unflatten(0, heads)[:, kept]
        state[at + "attn.W_O"] = block.attn.out.weight.T.unflatten(0, heads)
        state[at + "attn.b_O"] = block.attn.out.bias
        for x, layer in (("in", block.up), ("out", block.down)):
            state[f"{at}mlp.W_{x}"], state[f"{at}mlp.b_{x}"] = layer.weight.T, layer.bias
    for name, norm in norms.items() if c.layer_norm else ():
        state.update({f"{name}.w": norm.weight, f"{name}.b": norm.bias})
    return config, {name: x.detach().clone() for name, x in state.items()}


# ---------------------------------------------------------------- generation


class Cache:
    """
    Keys and values of the tokens that a causal model has read, at most `width`. No gradients. Rows
    are padded on the left by pads (n,). First model(prompts, cache=cache), then model(next, ...).
    """

    def __init__(self, model, pads, width):
        c, self.weight, self.used = model.config, model.tok.weight, 0
        self.pads = pads.to(self.weight.device)[:, None, None]
        shape = 2, len(pads), c.n_head, width, c.d_head  # keys and values of a block
        self.kv = {block.attn: self.weight.new_empty(shape) for block in model.blocks}

    def extend(self, t):
        """Open t more columns. Returns their positions (n, t), 0 for padding."""
        keys = torch.arange(self.used + t, device=self.pads.device)
        queries = keys[self.used:, None]
        # a padding sees itself: a softmax over nothing would be not a number
        seen = (keys >= self.pads) & (keys <= queries) | (keys == queries)  # (n, t, keys)
        self.mask = self.weight.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None]
        self.used += t
        return (keys[-t:] - self.pads[:, 0]).clamp(min=0)

    def put(self, attn, k, v):
        """Write k, v (n, h, t, e) of a block. Returns all so far, and the mask (n, 1, t, keys)."""
        kv = self.kv[attn][:, :, :, :self.used]
        kv[0, :, :, -k.shape[2]:], kv[1, :, :, -k.shape[2]:] = k, v
        return kv[0], kv[1], self.mask

    def keep(self, rows):
        """Drop the other rows of the batch."""
        self.pads = self.pads[rows]
        self.kv = {attn: kv[:, rows] for attn, kv in self.kv.items()}


def sample_next_token(logits, u, temperature=1.0):
    """
    Tokens (n,) for logits (n, v): the likeliest at temperature 0, else where the distribution's
    cumulative sum passes u (n,), uniform in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
    return tokens.clamp(max=logits.shape[-1] - 1)[:, 0]  # rounding, once in millions


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, rng, temperature=1.0, end=0):
    """
    Continue prompts, lists of token ids of any lengths, in one batch. Returns a list of new ids a
    prompt: up to and without the token `end` (-1: none ends), at most max_new_tokens, and with the
    prompt at most n_ctx. Every step draws (n,) from rng, also for ended rows: no row's draws depend
    on others. Raises ValueError for a model that is not causal, and for prompts empty or longer
    than n_ctx.
    """
    n, c, device = len(prompts), model.config, model.tok.weight.device
    if not prompts:
        return []
    lengths = torch.tensor([len(p) for p in prompts])
    if not c.causal or lengths.min() < 1 or lengths.max() > c.n_ctx:
        raise ValueError(f"generation needs a causal model and prompts of 1 to {c.n_ctx} tokens")
    longest, limits = int(lengths.max()), (c.n_ctx - lengths).clamp(max=max_new_tokens)
    tokens = [torch.as_tensor(p) for p in prompts]
    tokens = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_side="left")
    steps, tokens, u = int(limits.max()), tokens.to(device), None
    cache = Cache(model, longest - lengths, longest + steps)
    new = torch.full((n, steps), end)
    rows, ended = torch.arange(n), torch.zeros(n, dtype=torch.bool)  # rows: those in the batch
    for step in range(steps):
        check_stop()
        logits = model(tokens, at=tokens.shape[1] - 1, cache=cache)
        if temperature:
            u = torch.rand(n, generator=rng, device=rng.device)[rows].to(device)
        tokens = sample_next_token(logits, u, temperature)[:, None]
        new[rows, step] = tokens[:, 0].cpu()
        full = limits[rows] <= step + 1
        ended = ended | full | (new[rows, step] == end)
        if 2 * ended.sum() >= len(rows) or full.any():  # copies cost time; a full row has no room
            stay = ~ended
            rows, tokens, ended = rows[stay], tokens[stay], ended[stay]
            cache.keep(stay)
            if not len(rows):
                break
    new = [row[:limit] + [end] for row, limit in zip(new.tolist(), limits.tolist())]
    return [row[:row.index(end)] for row in new]


# ---------------------------------------------------------------- activations and edits


def activation_names(model):
    """Names of all activations, in order of computation."""
    return [name for name, m in model.named_modules() if type(m) is HookPoint]


@contextlib.contextmanager
def activation_edits(model, edits):
    """
    Within the `with`, replace activations: edits is {name: function of a tensor -> the new one, or
    None}. Undone on leaving, also after an exception. Raises KeyError for an unknown name.
    """
    known = activation_names(model)
    for name in set(edits) - set(known):
        raise KeyError(f"no activation {name!r}; there are {', '.join(known)}")
    with contextlib.ExitStack() as stack:
        for name, fn in edits.items():
            hook = lambda module, args, out, fn=fn: fn(out)
            stack.enter_context(model.get_submodule(name).register_forward_hook(hook))
        yield model


@torch.no_grad()
def activations(model, tokens, names=None, at=None):
    """Returns (logits, {name: activation}), by default of all names. No gradients."""
    cache, names = {}, names or activation_names(model)
    edits = {name: lambda x, name=name: cache.update({name: x}) for name in names}
    with activation_edits(model, edits):
        return model(tokens, at), cache


@contextlib.contextmanager
def weight_edits(model, edits):
    """
    Within the `with`, replace entries of parameters: edits is a list of (name, index, value).
    Undone bit for bit on leaving, also after an exception. Raises KeyError for an unknown name.
    """
    parameters = dict(model.named_parameters())
    names = {name for name, _, _ in edits}
    before = {name: parameters[name].detach().clone() for name in names}
    try:
        for name, index, value in edits:
            parameters[name].data[index] = value
        yield model
    finally:
        for name, old in before.items():
            parameters[name].data.copy_(old)


# ---------------------------------------------------------------- compiled weights
# Programs are lists of steps (data.py): variables with one residual dimension a value, the last one
# the output. Sizes and weights equal Tracr's (Lindner et al. 2023).

HARD = 100.           # attention scores, as in Tracr, before the division by sqrt(d_head)
LOGIT_SCALE = 10.     # ours: outputs are about 0 or 1; cross-entropy needs a scale
MLP_EXACTNESS = 650.  # slope of a width's steps: counts k are right if k (k + 1) < it: to 24
ONE, BOS = 0, 2       # residual dimensions: 1 everywhere, 1 at BOS
COMPILED = {"layer_norm": False, "activation": "relu", "train_head": False}


def place_steps(program, alphabet, max_seq_len):
    """
    Every step in the first free half-layer after its inputs (2i: attention of block i, 2i + 1: its
    MLP; a SelectorWidth takes both). {variable: {value: dimension}}, {step: half-layer}, Config.
    """
    names, dims, heads, mlps = ["one", "tokens:#", "tokens:$"], {}, [1], [1]
    place, used, ready = {}, set(), {"tokens": -1, "indices": -1}  # ready: after half-layer

    def add(variable, values):
        dims[variable] = {v: len(names) + i for i, v in enumerate(values)}
        names.extend(f"{variable}:{v}" for v in values)

    add("tokens", alphabet)
    add("indices", range(max_seq_len))
    for step in program:
        inputs = [v for v in step[1:] if isinstance(v, str)]
        for v in set(inputs) - set(dims):
            raise UserError(f"step {step.name}: no variable {v!r}; there are {', '.join(dims)}")
        is_map, is_width = isinstance(step, Map), isinstance(step, SelectorWidth)
        half = max(ready[v] for v in inputs) + 1
        while half % 2 != is_map or used & {half, half + is_width}:
            half += 1
        place[step.name], ready[step.name] = half, half + is_width
        used |= {half, half + is_width}
        if is_map:
            add(step.name, sorted({step.fn(v) for v in dims[step.of]}))
            mlps.append(len(dims[step.name]))
            continue
        heads += [len(dims[v]) + 2 for v in (step.keys, step.queries)]  # two more, as Tracr
        if is_width:
            add(step.name, range(max_seq_len + 1))
            names.append(f"{step.name}:share")  # the dimension after the last width
            mlps.append(2 * max_seq_len + 2)
        else:
            add(step.name, dims[step.values])
            heads.append(len(dims[step.values]))
    return dims, place, Config(
        vocab_size=len(alphabet) + 2, n_ctx=max_seq_len + 1, n_layer=max(used) // 2 + 1, n_head=1,
        d_model=len(names), d_head=max(heads), d_mlp=max(mlps), n_out=len(dims[step.name]),
        causal=False, residual=tuple(names), **COMPILED)


@torch.no_grad()
def compile_program(program, alphabet, max_seq_len, mlp_exactness=MLP_EXACTNESS):
    """A program as a GPT for BOS and max_seq_len positions. UserError for an unknown variable."""
    dims, place, config = place_steps(program, alphabet, max_seq_len)
    model = GPT(config)
    for p in model.parameters():
        p.zero_()
    for token in range(config.vocab_size):
        model.tok.weight[token, [ONE, 1 + token]] = 1
    for i, dim in dims["indices"].items():
        model.pos.weight[i + 1, dim] = 1  # BOS has no index
    for i, dim in enumerate(dims[program[-1].name].values()):
        model.head.weight[i, dim] = LOGIT_SCALE
    for step in program:
        block = model.blocks[place[step.name] // 2]
        if isinstance(step, Map):
            write_map(block, step, dims)
        else:
            write_head(block.attn, step, dims)
        if isinstance(step, SelectorWidth):
            write_width(block, list(dims[step.name].values()), mlp_exactness)
    return model


def write_map(block, step, dims):
    """MLP unit i is on where step.of has a value that step.fn maps to the i-th result."""
    results = list(dims[step.name])
    for value, dim in dims[step.of].items():
        block.up.weight[results.index(step.fn(value)), dim] = 1
    for i, dim in enumerate(dims[step.name].values()):
        block.down.weight[dim, i] = 1


def write_head(attn, step, dims):
    """
    A head that attends to the selected keys, or to BOS if there are none. An Aggregate carries the
    values; BOS attracts half as much as a key. A SelectorWidth carries the BOS flag; BOS attracts
    as much: the average is 1 / (1 + width).
    """
    q, k, v = attn.qkv.weight.chunk(3)
    keys, write = dims[step.keys], list(dims[step.name].values())
    for i, (key, dim) in enumerate(keys.items()):
        k[i, dim] = 1
        for query, query_dim in dims[step.queries].items():
            if step.selects(key, query):
                q[i, query_dim] = HARD
    k[len(keys), BOS] = 1
    if isinstance(step, SelectorWidth):
        q[len(keys), ONE], read, write = HARD, [BOS], [write[-1] + 1]
    else:
        q[len(keys), ONE], read = HARD / 2, dims[step.values].values()
    for i, dim in enumerate(read):
        v[i, dim] = attn.out.weight[write[i], i] = 1


def write_width(block, widths, mlp_exactness):
    """
    1 / (1 + width) becomes one-hot in the dimensions `widths`. Two units make a step of 1 within
    1 / mlp_exactness below the midpoint of neighbours; step k moves k + 1 to k.
    """
    up, down, share = block.up.weight, block.down.weight, widths[-1] + 1
    for k in range(len(widths) - 1):
        middle = (1 / (k + 1) + 1 / (k + 2)) / 2
        for i, sign in ((2 * k, 1), (2 * k + 1, -1)):
            up[i, share] = mlp_exactness
            up[i, ONE] = -mlp_exactness * middle + (sign == 1)
            down[widths[k], i] = sign
            down[widths[k + 1], i] = -sign
    up[-2, ONE] = down[widths[-1], -2] = 1  # where all steps are off
    up[-1, BOS] = 1                         # BOS itself has no width: undo
    down[[widths[0], share], -1] = -1


@torch.no_grad()
def balance(model):
    """
    ours: in- and outgoing weights of a hidden unit get the same norm; no output changes. Else noise
    of 1e-3 on a width's outgoing weights writes .9 into every dimension: no capability is left.
    """
    for block in model.blocks:
        into = torch.cat([block.up.weight, block.up.bias[:, None]], 1).norm(dim=1)
        out = block.down.weight.norm(dim=0)
        scale = (into / out).sqrt()
        scale[(into == 0) | (out == 0)] = 1
        block.up.weight /= scale[:, None]
        block.up.bias /= scale
        block.down.weight *= scale
    return model


@contextlib.contextmanager
def refuse(path, verdict):
    """Any exception that a foreign file leads to becomes a UserError of one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (MemoryError, torch.OutOfMemoryError):  # not the file's fault
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise UserError(f"{path}: {verdict} ({reason})") from None


def import_tracr(path):
    """
    (model, {alphabet, room: max_seq_len, values}) from Tracr's parameters in a .npz file:
    param/<module>/<name>, unembed, output_values, vocab (in id order), residual_labels, config
    (JSON: n_head, bos, pad, ...). Token ids become PAD 0, BOS 1, sorted letters. Raises UserError.
    """
    with refuse(path, "not parameters saved from Tracr"), np.errstate(over="ignore"):
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about, param = json.loads(str(arrays["config"])), {}
        for key, array in arrays.items():
            if key.startswith("param/") or key == "unembed":
                array = array.astype(np.float32, casting="same_kind")
                param[key.removeprefix("param/")] = torch.from_numpy(array)
        tok, pos = (param.pop(f"{name}_embed/embeddings") for name in ("token", "pos"))
        unembed, n_head = param.pop("unembed").T, int(about["n_head"])
        labels = arrays.get("residual_labels", np.array([])).astype(str).tolist()
        vocab, outputs = (arrays[x].astype(str).tolist() for x in ("vocab", "output_values"))
        special = [about["pad"], about["bos"]]
        alphabet = sorted(set(vocab) - set(special))
        numbers = all(v.lstrip("-").isdigit() for v in outputs)
        values = sorted(set(outputs), key=int if numbers else str)
        model = GPT(Config(
            vocab_size=len(tok), n_ctx=len(pos), n_head=n_head, d_model=tok.shape[1],
            n_layer=sum(key.endswith("mlp/linear_1/w") for key in param),
            d_head=len(param["layer_0/attn/query/b"]) // n_head,
            d_mlp=len(param["layer_0/mlp/linear_1/b"]), n_out=len(unembed),
            causal=bool(about.get("causal")), residual=tuple(labels), **COMPILED))
        state = {"tok.weight": tok[[vocab.index(t) for t in special + alphabet]],
                 "pos.weight": pos,
                 "head.weight": LOGIT_SCALE * unembed[[outputs.index(v) for v in values]]}
        layers = {"attn.qkv": ["attn/query", "attn/key", "attn/value"],
                  "attn.out": ["attn/linear"], "up": ["mlp/linear_1"], "down": ["mlp/linear_2"]}
        for i, (ours, theirs) in itertools.product(range(len(model.blocks)), layers.items()):
            for kind in ("weight", "bias"):
                parts = [param.pop(f"layer_{i}/{name}/{kind[0]}") for name in theirs]
                state[f"blocks.{i}.{ours}.{kind}"] = torch.cat(parts, -1).t()  # Tracr: x @ w + b
        if about.get("layer_norm") or about.get("activation", "relu") != "relu" or n_head < 1 \
                or param or len(set(labels)) not in (0, tok.shape[1]) \
                or not all(x.isfinite().all() for x in state.values()):
            raise ValueError("not finite, or not such a model")
        model.load_state_dict(state)  # strict: refuses letters and outputs named twice as well
    return model, {"alphabet": alphabet, "room": len(pos) - 1, "values": values}


# ---------------------------------------------------------------- checkpoints

KEYS = ("model", "optimizer", "config", "args", "setup", "scale", "stage", "step", "steps",
        "finished", "parent", "capability")


PLAIN = (str, int, float, bool, type(None))


def check_plain(value, name, also=()):
    """Raise UserError, naming it, for what torch.load(weights_only=True) or a record refuses."""
    if type(value) in (dict, collections.OrderedDict, list, tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            check_plain(key, name)
            check_plain(part, f"{name}[{key!r}]", also)
    elif type(value) not in (*PLAIN, *also):  # a numpy float is a float, but of its own type
        raise UserError(f"{name} is of {type(value)}, which a checkpoint cannot hold: make it "
                        "plain, as by .item(), or a string")


def save(path, ckpt):
    """
    Write a checkpoint: a dict of KEYS, tensors and plain Python only, else UserError. A finished
    one leaves out the optimizer's state, two thirds of the size.
    """
    if set(ckpt) != set(KEYS):
        raise UserError(f"a checkpoint has the keys {', '.join(KEYS)}; not so "
                        f"{', '.join(set(ckpt) ^ set(KEYS))}")
    for key, value in ckpt.items():
        tensors = (torch.Tensor, nn.Parameter) if key in ("model", "optimizer") else ()
        check_plain(value, f"checkpoint[{key!r}]", tensors)
    if ckpt["finished"]:
        ckpt = {**ckpt, "optimizer": {}}
    replace_file(path, lambda f: torch.save(ckpt, f))


def read_checkpoint(path, device="cpu"):
    """The dict that save() wrote: tensors and plain Python, no foreign code. Raises UserError."""
    with refuse(path, "not an unwrap checkpoint, or damaged"):
        check_archive(path)
        ckpt = torch.load(path, map_location=device, weights_only=True)
        if not set(KEYS) <= set(ckpt):
            raise ValueError("foreign")
        if not data.is_run(ckpt) or not data.has(ckpt, {"step": int, "finished": bool}) \
                or not 0 <= ckpt["step"] <= ckpt["steps"]:
            raise ValueError("stage, arguments, steps or parent")
        data.setup_of(ckpt)  # refuses stages, scales and arguments that make no sense
    return ckpt


def build(ckpt, device="cpu", path="checkpoint"):
    """The model of a checkpoint; path: its name in errors. Raises UserError."""
    with refuse(path, "not an unwrap checkpoint"):
        config, state = Config(**ckpt["config"]), ckpt["model"]
        if config.n_layer > len(state) or min(config.n_layer, config.n_head, config.d_mlp) < 1:
            raise ValueError("sizes")
        with torch.device("meta"):  # shapes are compared before anything is allocated
            shapes = {name: x.shape for name, x in GPT(config).state_dict().items()}
        if shapes != {name: x.shape for name, x in state.items()}:
            raise ValueError("weights do not fit the config")
        model = GPT(config)
        model.load_state_dict(state)
    return model.to(device)


def load(path, device="cpu", unfinished=False):
    """
    (model, ckpt) of a checkpoint file, with its `path` and `sha256` in ckpt. Raises UserError if it
    is foreign, damaged, or unfinished and this is not asked for.
    """
    path = str(path)
    ckpt = read_checkpoint(path, device)
    model = build(ckpt, device, path)
    if not (ckpt["finished"] or unfinished):
        raise UserError(f"{path}: unfinished, step {ckpt['step']} of {ckpt['steps']}: "
                        f"finish it with --resume first")
    return model, dict(ckpt, path=path, sha256=sha256(path))
