"""
How fast the scripts are beside plain code for the same work, which is written out below.

    $ python results/bench.py                    # all parts on a CPU, some minutes
    $ python results/bench.py --device cuda --bfloat16 --compile --parts pretraining finetuning

Variants run in one process, one after the other in every round, in the opposite order in the next.
A row: the median of the rounds, the 10th and 90th percentile, and the ratio, the reference's time
by the variant's (above 1 is faster). Rows replace those of the same machine and `what` in --out.
Small scale on a CPU, the paper's on a GPU.
"""
import argparse
import csv
import itertools
import os
import random
import sys
import time
from functools import partial
from types import SimpleNamespace

os.environ.setdefault("TQDM_DISABLE", "1")  # no bars: fit_probes() is called many times
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from analyze import fit_probes, residuals
from model import GPT, Config, loss_of
from pretrain import add_machine_flags, start_device, table, update

COLUMNS = "what variant median low high unit ratio n how device torch".split()
ARGS = SimpleNamespace(prior=data.PRIORS["low"], task="count", pair="ab", q=1, operand="b", c_tr=1.,
                       mix=0., relabel=False, answers=None, jailbreak=False, reverse=False)
RELATION = data.Relation("count", "a", "b", 1)


class PlainBlock(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.ln1, self.qkv = heads, nn.LayerNorm(d), nn.Linear(d, 3 * d)
        self.out, self.ln2, self.up = nn.Linear(d, d), nn.LayerNorm(d), nn.Linear(d, 4 * d)
        self.gelu, self.down = nn.GELU(), nn.Linear(4 * d, d)

    def forward(self, x):
        parts = self.qkv(self.ln1(x)).split(x.shape[2], 2)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in parts)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(z.transpose(1, 2).flatten(2))
        return x + self.down(self.gelu(self.up(self.ln2(x))))


class PlainGPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.tok, self.pos = nn.Embedding(c.vocab_size, c.d_model), nn.Embedding(c.n_ctx, c.d_model)
        self.blocks = nn.Sequential(*(PlainBlock(c.d_model, c.n_head) for _ in range(c.n_layer)))
        self.ln, self.head = nn.LayerNorm(c.d_model), nn.Linear(c.d_model, c.vocab_size, bias=False)

    def forward(self, tokens):
        x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.ln(self.blocks(x)))


def plain_string(symbol):
    """A string of the grammar: a rule at random, then each of its symbols."""
    rule = random.choice(data.GRAMMAR[symbol])
    return "".join(x if x in data.LETTERS else plain_string(x) for x in rule)


def new_model(setup):
    return GPT(Config(**setup.config())).init_weights(data.rng(0, "weights")).to(setup.device)


def plain_step(setup, batch, lr, dtype):
    """A function of k: a step on batch k, all positions, as textbooks have it."""
    ours, tokens = new_model(setup), batch(0).tokens
    model = PlainGPT(ours.config).to(setup.device)
    with torch.no_grad():  # the same weights stand in the same order, and give the same logits
        for p, q in zip(model.parameters(), ours.parameters(), strict=True):
            p.copy_(q)
        torch.testing.assert_close(model(tokens), ours(tokens), atol=1e-3, rtol=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(.9, .95), weight_decay=.1)

    def step(k):
        x = batch(k)
        at = slice(None) if x.at is None else slice(x.at, x.at + 1)  # fine-tuning: the answer
        optimizer.zero_grad()
        with torch.autocast(setup.device.type, torch.bfloat16, dtype == "bfloat16"):
            logits = model(x.tokens)[:, at].flatten(0, 1)
            loss = F.cross_entropy(logits, x.target[:, at].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        loss.item()
    return step


def our_step(setup, batch, lr, dtype, compiled=False):
    """The same as the scripts take it."""
    model = new_model(setup)
    mode = "reduce-overhead" if setup.device.type == "cuda" else None  # as Run's
    forward = torch.compile(model, mode=mode) if compiled else model
    optimizer = setup.optimizer(model, 0.)
    cast = torch.autocast(setup.device.type, torch.bfloat16, dtype == "bfloat16",
                          cache_enabled=False)

    def step(k):
        with cast:
            loss = loss_of(forward, batch(k))
        update(model, optimizer, loss, lr)
    return step


def rounds(bench, variants, group=1):
    """{name: seconds (repeats,)} of functions of a step, `group` steps a round."""
    wait = torch.cuda.synchronize if bench.on_gpu else lambda: None
    seconds = {name: [] for name in variants}
    for i in range(bench.repeats + 2):
        for name in list(variants)[::1 - i % 2 * 2]:
            wait()
            start = time.perf_counter()
            for k in range(i * group, (i + 1) * group):
                variants[name](k)
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(times[2:]) for name, times in seconds.items()}  # 2: tables, compiling


def row_of(what, variant, values, unit, ratios=None, how=""):
    low, median, high = (f"{x:.0f}" if x >= 1000 else f"{x:.4g}"
                         for x in np.quantile(values, (.1, .5, .9)))
    ratio = "" if ratios is None else f"{np.median(ratios):.2f}"
    return dict(what=what, variant=variant, median=median, low=low, high=high, unit=unit,
                ratio=ratio, n=len(values), how=how)


def steps(bench, stage, lr):
    """Steps on batches that are there already; drawing them."""
    setup, group, variants, scale = bench.setup, bench.group, {}, f"{bench.setup.scale} scale"
    draw = data.stream(partial(getattr(setup, stage), args=ARGS), 96, 0, "bench", setup.draws_on)
    together = data.CHUNK_ON_GPU if bench.on_gpu else data.CHUNK
    batches = [draw(k) for k in range(together)]
    batch = lambda k: batches[k % together]
    for dtype in bench.dtypes:
        variants[f"textbook {dtype}"] = plain_step(setup, batch, lr, dtype)
        variants[f"ours {dtype}"] = our_step(setup, batch, lr, dtype)
        if bench.compile:
            variants[f"ours {dtype} compiled"] = our_step(setup, batch, lr, dtype, True)
    times = rounds(bench, variants, group)
    for name in variants:
        yield row_of(f"{stage} step, {scale}", name, 1e3 * times[name] / group, "ms",
                     times["textbook float32"] / times[name], f"96 strings; {group} a round")
    drawn = rounds(bench, {"ours": lambda i: draw((i + 1) * together)})["ours"]
    yield row_of(f"a batch for {stage}, {scale}", "ours", 1e3 * drawn / together, "ms",
                 how=f"{together} are drawn together")


def sampler(bench, few=48, many=1536):
    rng = data.rng(0, "bench", device=bench.setup.draws_on)
    times = rounds(bench, {"recursive": lambda i: [plain_string("s") for _ in range(few)],
                           "ours": lambda i: data.sample_strings(many, rng)})
    plain, ours = few / times["recursive"], many / times["ours"]
    yield row_of("whole strings", "recursive", plain, "a second", plain / plain, "in plain Python")
    yield row_of("whole strings", "ours", ours, "a second", ours / plain, f"{many} at a time")


def probes(bench, once=25, fits=100, count=4000):
    """Linear probes of a and b after every block while b is asked."""
    setup, model, picks = bench.setup, new_model(bench.setup), data.rng(0, "picks")
    rng, sites = data.rng(0, "bench", device=setup.draws_on), setup.n_layer + 1
    layers = nn.ModuleList(nn.Linear(setup.d_model, setup.window + 1) for _ in range(2 * sites))
    optimizer = torch.optim.AdamW(layers.to(setup.device).parameters(), lr=1e-3)

    def draw(n):
        """Residuals (sites, n, d) and labels (2 sites, n) of new strings, half natural, half c0."""
        text = torch.cat([setup.text(n // 2, RELATION, c, rng) for c in ("natural", "c0")])
        x = setup.ask(text, "count", "b")
        return residuals(model, x, setup.site(x)), x.labels[:, :2].T.repeat_interleave(sites, 0)

    def paper(i):
        x, y = draw(96)
        optimizer.zero_grad()
        triples = zip(layers, itertools.cycle(x), y)
        sum(F.cross_entropy(layer(site), labels) for layer, site, labels in triples).backward()
        optimizer.step()
    x, y = draw(5000)
    papers = rounds(bench, {"paper": paper}, once)["paper"] * count / once
    times = rounds(bench, {"draw": lambda i: draw(5000), "fit": lambda i: fit_probes(
        x, [*range(sites)] * 2, y, fits, picks)})
    ours = times["draw"] + times["fit"] * count / fits
    what = f"{2 * sites} probes, {count} steps, {setup.scale} scale"
    yield row_of(what, "the paper's protocol", papers, "s", papers / papers, "new strings every "
                 f"step, read by one pass for all probes; {once} steps measured, times "
                 f"{count // once}")
    yield row_of(what, "ours", ours, "s", papers / ours, "activations of 5,000 strings, drawing "
                 f"included; {fits} steps measured, times {count // fits}")


PARTS = {"pretraining": lambda bench: steps(bench, "pretraining", bench.setup.pretrain_lr),
         "finetuning": lambda bench: steps(bench, "finetuning", bench.setup.finetune_lr),
         "sampler": sampler, "probes": probes}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--repeats", type=int, default=11, help="rounds (default: 11)")
    add("--out", default="results/bench.csv", help="(default: results/bench.csv)")
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="(default: all)")
    add("--bfloat16", action="store_true", help="also steps in bfloat16")
    add("--compile", action="store_true", help="also steps with torch.compile")
    add_machine_flags(parser)
    args = parser.parse_args()
    device = start_device(args)
    on_gpu, threads = device.type == "cuda", torch.get_num_threads()
    bench = SimpleNamespace(
        setup=data.find_setup("pcfg", "paper" if on_gpu else "small", device), on_gpu=on_gpu,
        group=10 if on_gpu else 5, repeats=args.repeats, compile=args.compile,
        dtypes=["float32"] + ["bfloat16"] * args.bfloat16)
    name = torch.cuda.get_device_name(device) if on_gpu else (
        f"{torch.cpu.get_capabilities().get('cpu_name', 'CPU')}, {threads} threads")
    rows = [{**row, "device": name, "torch": torch.__version__}
            for part in args.parts for row in PARTS[part](bench)]
    new, old = {(row["what"], row["device"]) for row in rows}, []
    if os.path.isfile(args.out):
        with open(args.out, newline="") as file:
            old = [row for row in csv.DictReader(file) if (row["what"], row["device"]) not in new]
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(old + rows)
    table(COLUMNS[:-2], [map(row.get, COLUMNS[:-2]) for row in rows])


if __name__ == "__main__":
    main()
