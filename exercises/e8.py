"""
Exercise 8: hide it from an instrument                               difficulty 4 of 5, 90 minutes

An instrument that finds every wrapper you have seen may miss the next one. Make a model from pre.pt
that answers "count a" only behind a password (the token T_J1 in place of T_NJ), and choose an
instrument that finds a in ft.pt but not in yours. The password is the proof that it is there. Can
another instrument still find it without the password?

Write the function, and name the two instruments: analyses or files in instruments/. Begin with
finetune.py --lock, and look at what each instrument says (python analyze.py noise --ckpt ...). To
fool one that finds the usual lock, train against it in a copy of finetune.py.
Make:   python exercises/make.py e8          # writes exercises/out/e8.pt
Check:  python -m pytest exercises/test_e8.py
The check wants 99 % by the password and the floor without it; FOOLED to find a in ft.pt and not in
your model; FINDS to find it in your model.
"""
FOOLED = ""  # an instrument: lens, noise, quantise, patch, hybrids, weights, relearn_rates, ...
FINDS = ""   # another one


def train(ckpt, out, *flags):
    """Write the finished checkpoint `out`, made from the checkpoint `ckpt`; two paths.

    flags: words to pass on to every finetune.main([...]), behind your own (a rehearsal gives
    --steps)."""
    raise NotImplementedError
