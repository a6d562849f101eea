"""Exercise 6: delete by gradients: GradDiff and NPO."""
import torch
import torch.nn.functional as F

from model import loss_of


def graddiff(model, base, forget, retain):
    """Ascent on what to forget, descent on the rest."""
    return loss_of(model, retain) - loss_of(model, forget)


def npo(model, base, forget, retain, beta=.1):
    """Ascent on each string that fades as its answer is lost, descent on the rest."""
    def losses(net):
        return F.cross_entropy(net(forget.tokens, forget.at), forget.answer, reduction="none")
    with torch.no_grad():
        before = losses(base)
    lost = losses(model) - before
    return loss_of(model, retain) - 2 / beta * F.logsigmoid(beta * lost).mean()
