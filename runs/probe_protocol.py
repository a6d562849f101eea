"""
Do probes trained together on stored activations agree with the paper's protocol, and how much time do they save?

    $ python runs/probe_protocol.py results/count/low-0.pt       # writes results/probe_protocol.json, about 3 minutes

The paper: one probe at a time, 4K AdamW iterations, every one on 96 fresh strings through the model. Here:
all probes at once on activations computed once. The case: r(a) while b is asked, natural strings, after every block.
"""
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
from analyze import fit_probes, residuals  # noqa: E402
from model import load  # noqa: E402
from pretrain import test_set  # noqa: E402

torch.set_num_threads(1)
model, ckpt = load(sys.argv[1])
sc, seed, task = data.scale_of(ckpt["scale"]), ckpt["args"]["seed"], ckpt["capability"]["task"]
test = test_set(4000, sc, task, "b", "natural", seed, label="protocol-test")
held, truth = residuals(model, test.tokens, sc), test.results[:, 0]
bar = SimpleNamespace(update=lambda: None)


def accuracies(x, weight, bias):
    return [round((x[i] @ w + c).argmax(1).eq(truth).double().mean().item(), 4) for i, (w, c) in enumerate(zip(weight, bias))]


began = time.process_time()  # the paper's, for all blocks in one go: a forward pass serves them all
blocks, classes = len(model.blocks) + 1, sc.window + 1
weight = torch.zeros(blocks, sc.d_model, classes, requires_grad=True)
bias = torch.zeros(blocks, 1, classes, requires_grad=True)
optimizer = torch.optim.AdamW([weight, bias], lr=1e-3)
schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2000, 3000, 3500], .1)
for step in range(4000):
    batch = test_set(96, sc, task, "b", "natural", seed, label=f"protocol-{step}")
    logits = torch.baddbmm(bias, residuals(model, batch.tokens, sc), weight)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.results[:, 0].repeat(blocks), reduction="sum") / 96
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
exact = accuracies(held, weight.detach(), bias.detach())
exact_seconds = time.process_time() - began

began = time.process_time()
train = test_set(5000, sc, task, "b", "natural", seed, label="protocol-train")
x = residuals(model, train.tokens, sc)
g, site, y = data.rng(seed, "protocol"), list(range(blocks)), train.results[:, 0].expand(blocks, -1)
raw = accuracies(held, *fit_probes(x, site, y, 4000, g, bar))
stored_seconds = time.process_time() - began
mean, sd = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-8
standardised = accuracies((held - mean) / sd, *fit_probes((x - mean) / sd, site, y, 4000, g, bar))
result = {"case": "r(a) while b is asked, 4,000 natural strings, after block 0 (embedding) ... ", "checkpoint": sys.argv[1],
          "paper_protocol": exact, "stored": raw, "stored_and_standardised": standardised, "paper_cpu_seconds": round(exact_seconds, 1),
          "stored_cpu_seconds": round(stored_seconds, 1), "ratio": round(exact_seconds / stored_seconds, 1)}
Path("results/probe_protocol.json").write_text(json.dumps(result, indent=1) + "\n")
print(json.dumps(result, indent=1))
