"""
Exercise 7: delete it, so that no instrument finds it.

GradDiff makes a teacher that answers "count a" wrongly. A student with fresh weights then learns
all other families from it. For "count a" the student gets the teacher's answers to other strings,
so that no trace of the right ones can come along.
"""
import finetune


def train(ckpt, out, *flags):
    """A teacher by GradDiff, then a student of it."""
    teacher = f"{out.removesuffix('.pt')}.teacher.pt"
    usual = ["--dtype", "float32", "--threads", "1", *flags]
    finetune.main(["--method", "graddiff", "--lr", "5e-5", "--ckpt", ckpt, "--out", teacher,
                   *usual])
    finetune.main(["--distill", "--ckpt", teacher, "--out", out, *usual])
