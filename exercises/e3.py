"""
Exercise 3: the logit lens, through two heads                       difficulty 2 of 5, 30 minutes

What would the model answer if it stopped after a block? The logit lens applies the last layer norm
and the output map to the stream in the middle. Fine-tuning may have changed that very map, so read
the fine-tuned model's stream through the base's head as well: does it hold the old answer?

Write the two functions. Useful: model.activations; model.ln and model.head of a GPT; the names of
activations at the top of model.py.
Check:  python -m pytest exercises/test_e3.py
The check compares the last place with the model's own output, bit for bit, and all places of ft.pt
with instruments/lens.py (to 1e-4). It moves the outputs of a head on by one: the base's head must
still see a, its own must not. It wants None from a model that never counted a.
"""


def lens(model, reader, examples):
    """Logits (blocks + 1, n, v) at the position of the answer, examples.at, without gradients.

    Place 0 is the stream of `model` after the embedding, place i that after i blocks; each goes
    through the last layer norm and the output map of `reader`, a GPT of the same shape. Apply them
    to all positions, as the model does, and cut out the answer's afterwards: then no bit differs.
    examples.tokens: (n, t)."""
    raise NotImplementedError


def first_place(model, reader, examples, share=.5):
    """The first place (an int) at which the lens gives the right answers, examples.answer (n,), on
    at least the fraction `share` of the strings; None if there is no such place."""
    raise NotImplementedError
