"""A training step with few and many threads, and in the child of a fork."""

import subprocess
import sys

import pytest
import torch

import budwood
from budwood import _C

THREADS = (1, 2, 3, 7, 16, 64)


@pytest.fixture(autouse=True)
def two_threads_afterwards():
    yield
    torch.set_num_threads(2)


def step(model, rows):
    torch.manual_seed(1)
    ids = torch.randint(0, 90, rows)
    batch = _C.TokenBatch.from_rows(ids)
    loss = model.loss(batch, ids.flatten())
    (loss.sum / loss.count).backward()
    grads = {}
    for path, p in _C.trainable_parameters(model):
        grads[path], p.grad = p.grad, None
    return loss.sum.detach(), grads


@pytest.mark.parametrize("rows", [(1, 1), (3, 41)])
@pytest.mark.parametrize("quantize", ["", "nf4"])
def test_a_step_does_not_depend_on_the_number_of_threads(tiny_folder, quantize, rows):
    options = {"quantize": quantize, "block_size": 32} if quantize else {}
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32", **options)
    _C.inject(model, budwood.LoraConfig(r=4, target_modules="all-linear"), seed=3)
    with torch.no_grad():
        for _, p in _C.trainable_parameters(model):
            p.normal_(0, 0.1, generator=torch.Generator().manual_seed(4))
    model.train()
    torch.set_num_threads(THREADS[0])
    wanted, exact = step(model, rows)
    for threads in THREADS[1:]:
        torch.set_num_threads(threads)
        found, grads = step(model, rows)
        assert torch.allclose(found, wanted, rtol=1e-6)
        for path, grad in grads.items():
            assert (grad - exact[path]).norm() <= 1e-5 * exact[path].norm(), (threads, path)


CHILD = """
import os, sys, torch
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(2)
import budwood
from budwood import _C
from test_threads import step

model = _C.load_model(sys.argv[1], dtype="float32", quantize="nf4", block_size=32)
_C.inject(model, budwood.LoraConfig(r=4, target_modules="all-linear"), seed=3)
model.train()
big = torch.randn(64, 64)
def all_of_it():
    return step(model, (8, 60))[0].item(), (big @ big).sum().item()

before = all_of_it()
child = os.fork()
if child == 0:
    after = all_of_it()
    os._exit(0 if abs(after[0] - before[0]) < 1e-3 * abs(before[0]) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.get_num_threads() == 2
assert abs(all_of_it()[0] - before[0]) < 1e-3 * abs(before[0])
"""


def test_the_child_of_a_fork_goes_on(tiny_folder):
    """OpenMP's threads stay behind in the parent; the child must not wait for them."""
    here = __file__.rpartition("/")[0]
    command = [sys.executable, "-c", CHILD, tiny_folder("llama"), here]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
