"""Exercise 2: a probe, and what it must be compared with."""
import torch
import torch.nn.functional as F

from model import residuals


def fit(x, y):
    """Softmax regression on standardised activations: 2,000 steps of 96 of them."""
    mean, sd = x.mean(0), x.std(0) + 1e-8
    x, rng = (x - mean) / sd, torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
    for _ in range(2000):
        pick = torch.randint(len(x), (96,), generator=rng)
        loss = F.cross_entropy(layer(x[pick]), y[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lambda new: layer((new - mean) / sd).argmax(1)


def read(study, model, operand):
    """Accuracy of the best place, which is chosen on some natural strings, scored on others."""
    def streams(split, label, n):
        x = study.test("b", split, label, n).examples
        return residuals(model, x, study.setup.site(x)), study.labels(x, operand)

    sets = [streams(split, "probe", 1500) for split in ("natural", "c0")]
    x, y = torch.cat([x for x, _ in sets], 1), torch.cat([y for _, y in sets])
    probes = [fit(stream, y) for stream in x]

    def accuracies(label):
        x, y = streams("natural", label, 500)
        return [(probe(s) == y).float().mean().item() for probe, s in zip(probes, x)]
    chosen = accuracies("select")
    return accuracies("test")[chosen.index(max(chosen))]


def finding(study):
    """(reading of a, the better of the two readings that need no knowledge of a)."""
    controls = [read(study, study.untrained(), "a")]
    if study.never_trained:
        controls.append(read(study, study.model, study.never_trained[2]))
    return read(study, study.model, "a"), max(controls)
