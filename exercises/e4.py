"""
Exercise 4: where was it planted?                                    difficulty 3 of 5, 45 minutes

Four sealed models each hide "count a" behind a wrapper that stands in one part: the embeddings (tok
and pos), one of the three blocks, or the output side (ln and head). All else is the base's. Put
activations of the base into such a model, site by site: from which site on is a back?

Write the two functions. Useful: model.activations, model.activation_edits, model.accuracy.
Check:  python -m pytest exercises/test_e4.py
A patch of a model with its own activation must not change a bit, and must leave nothing behind.
Then your locate() has to name the part in models with wrappers that the check plants itself, beside
changes of all other parts that change no answer (so comparing weights does not help), and in the
four sealed models. All four must be right at once: there is one hash for them.
"""


def patch(host, donor, examples, site):
    """Logits (n, v) of the host at examples.at, while at one site the donor's activation replaces
    the host's, at all positions. Both models read examples.tokens (n, t). site: a name such as
    "embed" or "blocks.0.attn_out"."""
    raise NotImplementedError


def locate(base, model, examples):
    """The part in which `model` differs from the base, by patching alone: "embed", "blocks.0",
    "blocks.1", "blocks.2" or "head". The base answers the examples, the model does not."""
    raise NotImplementedError
