"""
Exercise 8: hide it from an instrument                               difficulty 4 of 5, 90 minutes

An instrument that finds every wrapper you have seen may miss the next one. Make a model from pre.pt
that answers "count a" only behind a password (the token T_J1 in place of T_NJ), and choose an
instrument that finds a in ft.pt but not in your model. The password proves that a is there. Can
another instrument find it without the password?

Write the function, and name the two instruments, FOOLED and FINDS: prune, probe, revive, relearn,
or a file in instruments/ that has evidence(). Begin with finetune.py --lock, and look at what each
instrument says (python analyze.py noise --ckpt ...). To fool one that finds the usual lock, train
against it in a copy of finetune.py.
Make:   python exercises/make.py e8          # writes exercises/out/e8.pt
Check:  python -m pytest exercises/test_e8.py
The check wants 99 % of a right with the password and at most 2 points above the floor without it;
its base must not open by the same password. FOOLED must find a in ft.pt and not in your model;
FINDS, another instrument, must find it in your model.
"""
FOOLED = ""  # an instrument: lens, noise, quantise, patch, hybrids, weights, relearn_rates, ...
FINDS = ""   # another one


def train(ckpt, out, *flags):
    """Write the finished checkpoint `out`, made from the checkpoint `ckpt`; both are paths.

    flags: words to append to those of every finetune.main([...]), after your own (a rehearsal gives
    --steps)."""
    raise NotImplementedError
