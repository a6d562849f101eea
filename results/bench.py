"""
How fast the scripts are beside plain code for the same work, which is written out below.

    $ python results/bench.py                    # all parts on a CPU, some minutes
    $ python results/bench.py --device cuda --compile --parts pretraining finetuning

Variants run in one process, one after the other in every round, in the opposite order in the next.
A row gives the median of the rounds, the 10th and 90th percentile, and the ratio: the reference's
time by the variant's, above 1 is faster. Rows replace those of the same machine and `what` in
--out. Small scale on a CPU, the paper's on a GPU; capability: always small.
"""
import argparse
import csv
import itertools
import os
import random
import sys
import time
from types import SimpleNamespace

os.environ.setdefault("TQDM_DISABLE", "1")  # no bars: fit_probes() is called many times
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from analyze import fit_probes, residuals
from model import GPT, Config, accuracy, loss_of, predict
from pretrain import add_machine_flags, autocast, cosine, start_device, table, update

COLUMNS = "what variant median low high unit ratio n how device torch".split()
ARGS = SimpleNamespace(prior=data.PRIORS["low"], task="count", pair="ab", q=1, operand="b", c_tr=1.,
                       mix=0., relabel=False, answers=None, jailbreak=False, reverse=False)
RELATION = data.Relation("count", "a", "b", 1)
DTYPES = "float32", "bfloat16"


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


def plain_steps(bench, batch, lr, dtype):
    """A function: `group` steps of all positions, as textbooks have them."""
    ours, device, numbers = new_model(bench.setup), bench.setup.device, itertools.count()
    model, tokens = PlainGPT(ours.config).to(device), batch(0).tokens
    with torch.no_grad():  # the same weights stand in the same order, and give the same logits
        for p, q in zip(model.parameters(), ours.parameters(), strict=True):
            p.copy_(q)
        torch.testing.assert_close(model(tokens), ours(tokens), atol=1e-3, rtol=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(.9, .95), weight_decay=.1)

    def run():
        for x in map(batch, itertools.islice(numbers, bench.group)):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
                at = slice(None) if x.at is None else slice(x.at, x.at + 1)  # fine-tuning: one
                logits = model(x.tokens)[:, at].flatten(0, 1)
                loss = F.cross_entropy(logits, x.target[:, at].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            loss.item()
    return run


def our_steps(setup, model, batch, lr_at, dtype, group, compiled=False):
    """A function: the next `group` steps, as the scripts take them."""
    forward = torch.compile(model, mode="reduce-overhead") if compiled else model
    optimizer, cast, numbers = setup.optimizer(model, 0.), autocast(dtype, setup), itertools.count()

    def run():
        for step in itertools.islice(numbers, group):
            with cast:
                loss = loss_of(forward, batch(step))
            update(model, optimizer, loss, lr_at(step))
    return run


def rounds(bench, variants):
    """{name: seconds (repeats,)} of functions, each once a round."""
    wait = torch.cuda.synchronize if bench.on_gpu else lambda: None
    seconds = {name: [] for name in variants}
    for run in variants.values():  # tables and compiling are made only once
        run()
        run()
    for i in range(bench.repeats):
        for name in list(variants)[::1 - i % 2 * 2]:
            wait()
            start = time.perf_counter()
            variants[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in seconds.items()}


def row(what, variant, values, unit, ratios=None, how=""):
    low, median, high = (f"{x:.0f}" if x >= 1000 else f"{x:.4g}"
                         for x in np.quantile(values, (.1, .5, .9)))
    ratio = "" if ratios is None else f"{np.median(ratios):.2f}"
    return dict(what=what, variant=variant, median=median, low=low, high=high, unit=unit,
                ratio=ratio, n=len(values), how=how)


def stream(stage, setup, label):
    def draw(n, rng):
        return getattr(setup, stage)(n, rng, ARGS)
    return data.stream(draw, 96, 0, label, setup.device)


def steps(bench, stage, lr):
    """Steps on batches that are there already; drawing them; large products."""
    setup, group, variants = bench.setup, bench.group, {}
    chunk = data.CHUNK_ON_GPU if bench.on_gpu else data.CHUNK
    draw, chunks = stream(stage, setup, "bench"), itertools.count(chunk, chunk)
    batches = [draw(k) for k in range(chunk)]
    batch, lr_at = lambda k: batches[k % len(batches)], lambda step: lr
    for dtype, compiled in itertools.product(DTYPES, range(1 + bench.compile)):
        ours = our_steps(setup, new_model(setup), batch, lr_at, dtype, group, compiled)
        variants[f"ours {dtype}" + " compiled" * compiled] = ours
        variants[f"textbook {dtype}"] = plain_steps(bench, batch, lr, dtype)
    times, scale = rounds(bench, variants), f"{setup.scale} scale"
    for name in sorted(variants, reverse=True):
        yield row(f"{stage} step, {scale}", name, 1e3 * times[name] / group, "ms",
                  times["textbook float32"] / times[name], f"96 strings; {group} a round")
    drawn = rounds(bench, {"ours": lambda: draw(next(chunks))})["ours"]
    yield row(f"a batch for {stage}, {scale}", "ours", 1e3 * drawn / chunk, "ms",
              how=f"{chunk} are drawn together")
    (n, t), blocks = batches[0].tokens.shape, new_model(setup).blocks
    weights = sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    weights += setup.config()["vocab_size"] * setup.d_model
    attention = setup.n_layer * setup.d_model * (t + 1)  # causal: half of all pairs
    size = 8192 if bench.on_gpu else 2048
    for dtype in DTYPES if stage == "pretraining" else ():
        x = torch.randn(size, size, device=setup.device).to(getattr(torch, dtype))
        seconds = rounds(bench, {"product": lambda: torch.mm(x, x)})["product"]
        done, peak = 6 * n * t * (weights + attention), 2 * size ** 3 / np.median(seconds)
        yield row(f"share of the rate of large products, {stage} step, {scale}", f"ours {dtype}",
                  100 * done / (times[f"ours {dtype}"] / group) / peak, "%",
                  how=f"of {peak / 1e9:.0f} GFLOP/s, {size} square")


def sampler(bench, few=48, many=1536):
    rng = data.rng(0, "bench", device=bench.setup.device)
    times = rounds(bench, {"recursive": lambda: [plain_string("s") for _ in range(few)],
                           "ours": lambda: data.sample_strings(many, rng)})
    plain, ours = few / times["recursive"], many / times["ours"]
    yield row("whole strings", "recursive", plain, "a second", plain / plain, "in plain Python")
    yield row("whole strings", "ours", ours, "a second", ours / plain, f"{many} at a time")


def probes(bench, once=25, fits=100, steps=4000):
    """Linear probes of a and b after every block while b is asked."""
    setup, model, picks = bench.setup, new_model(bench.setup), data.rng(0, "picks")
    rng, sites = data.rng(0, "bench", device=setup.device), setup.n_layer + 1
    layers = [nn.Linear(setup.d_model, setup.window + 1) for _ in range(2 * sites)]
    layers = nn.ModuleList(layers).to(setup.device)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-3)  # a schedule would take no time

    def draw(n):
        """Residuals (sites, n, d) and labels (2 sites, n) of new strings, half natural, half c0."""
        text = torch.cat([setup.text(n // 2, RELATION, c, rng) for c in ("natural", "c0")])
        x = setup.ask(text, "count", "b")
        return residuals(model, x, setup.site(x)), x.labels[:, :2].T.repeat_interleave(sites, 0)

    def paper():
        for x, y in map(draw, [96] * once):
            optimizer.zero_grad()
            triples = zip(layers, itertools.cycle(x), y)
            sum(F.cross_entropy(layer(site), labels) for layer, site, labels in triples).backward()
            optimizer.step()
    x, y = draw(5000)
    times = rounds(bench, {
        "paper": paper, "draw": lambda: draw(5000),
        "fit": lambda: fit_probes(x, [*range(sites)] * 2, y, fits, picks)})
    papers, ours = times["paper"] * steps / once, times["draw"] + times["fit"] * steps / fits
    what = f"{2 * sites} probes, {steps} steps, {setup.scale} scale"
    yield row(what, "the paper's protocol", papers, "s", papers / papers, "new strings every step, "
              f"read by one pass for all probes; {once} steps measured, times {steps // once}")
    yield row(what, "ours", ours, "s", papers / ours, "activations of 5,000 strings, drawing "
              f"included; {fits} steps measured, times {steps // fits}")


def capability(bench, goal=.99, every=50):
    """From new weights to counting a, as `python pretrain.py` gets there."""
    setup, spent = data.find_setup("pcfg", "small", bench.setup.device), {}
    test = setup.test(RELATION, "a", "c0", 500, 0).examples
    lr_at, batch = cosine(setup.pretrain_lr, setup.pretrain_steps), stream("pretraining", setup, "x")
    for dtype in DTYPES:
        model, right, done = new_model(setup), 0, 0
        train, start = our_steps(setup, model, batch, lr_at, dtype, every), time.perf_counter()
        while right < goal and done < setup.pretrain_steps:
            train()
            done, right = done + every, accuracy(predict(model, test), test.answer)
        spent[dtype] = np.array([time.perf_counter() - start])
        yield row(f"{goal:.0%} on count a, c0, small scale", f"ours {dtype}", spent[dtype], "s",
                  spent["float32"] / spent[dtype], f"{right:.1%} after {done} steps, with drawing "
                  f"and an evaluation every {every}")


PARTS = {"pretraining": lambda bench: steps(bench, "pretraining", bench.setup.pretrain_lr),
         "finetuning": lambda bench: steps(bench, "finetuning", bench.setup.finetune_lr),
         "sampler": sampler, "probes": probes, "capability": capability}


def write(path, rows):
    kept, new = [], {(r["what"], r["device"]) for r in rows}
    if os.path.isfile(path):
        with open(path, newline="") as file:
            kept = [r for r in csv.DictReader(file) if (r["what"], r["device"]) not in new]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--repeats", type=int, default=11, help="rounds (default: 11)")
    add("--out", default="results/bench.csv", help="(default: results/bench.csv)")
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="(default: all)")
    add("--compile", action="store_true", help="also steps with torch.compile")
    add_machine_flags(parser)
    args = parser.parse_args(words)
    if os.getloadavg()[0] > .5 * os.cpu_count():
        print(f"warning: load {os.getloadavg()[0]:.1f}: other programs run on this machine")
    device = start_device(args)
    on_gpu, rows = device.type == "cuda", []
    bench = SimpleNamespace(
        setup=data.find_setup("pcfg", "paper" if on_gpu else "small", device), on_gpu=on_gpu,
        group=10 if on_gpu else 5, repeats=args.repeats, compile=args.compile)
    name = torch.cuda.get_device_name(device) if on_gpu else "{}, {} threads".format(
        torch.cpu.get_capabilities().get("cpu_name", "CPU"), torch.get_num_threads())
    for part in args.parts:
        print(f"{part} ...", flush=True)
        rows += [{**r, "device": name, "torch": torch.__version__} for r in PARTS[part](bench)]
        write(args.out, rows)
    table(COLUMNS[:-2], [[r[key] for key in COLUMNS[:-2]] for r in rows])


if __name__ == "__main__":
    main()
