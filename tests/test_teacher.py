"""A frozen teacher does not move: evaluation mode at every forward pass, and a digest that notices."""

import torch
from torch import nn

from vkd_plugin.teacher import frozen_roots, keep_in_eval, state_digest


def _teacher() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_frozen_teacher_is_put_back_into_eval_before_each_forward() -> None:
    teacher = _teacher().requires_grad_(False)
    keep_in_eval(teacher, teacher)
    assert not teacher.training
    before = state_digest(teacher)
    teacher.train()
    teacher(torch.randn(8, 4) + 3)
    assert not any(m.training for m in teacher.modules())
    assert state_digest(teacher) == before


def test_the_digest_notices_batch_norm_statistics_and_single_weights() -> None:
    teacher = _teacher()
    before = state_digest(teacher)
    teacher(torch.randn(8, 4) + 3)
    moved = state_digest(teacher)
    assert moved != before
    with torch.no_grad():
        teacher[0].weight[0, 0] += 1e-6
    assert state_digest(teacher) not in (before, moved)


def test_the_digest_covers_buffers_outside_of_the_state_dict() -> None:
    teacher = _teacher()
    teacher.register_buffer("mask", torch.zeros(1), persistent=False)
    before = state_digest(teacher)
    teacher.mask += 1
    assert state_digest(teacher) != before


def test_trainable_parts_keep_their_mode() -> None:
    teacher = nn.Sequential(_teacher().requires_grad_(False), _teacher())
    assert frozen_roots(teacher) == [teacher[0]]
    handle = keep_in_eval(teacher, teacher)
    assert not teacher[0].training
    assert teacher[1][2].training
    handle.remove()
    teacher.train()
    teacher(torch.randn(8, 4))
    assert teacher[0].training


def test_layers_that_a_wrapper_adds_keep_their_mode() -> None:
    teacher = _teacher().requires_grad_(False)
    wrapper = nn.Sequential(teacher, nn.BatchNorm1d(4, affine=False))
    keep_in_eval(teacher, wrapper)
    wrapper.train()
    wrapper(torch.randn(8, 4))
    assert not teacher.training
    assert wrapper[1].training
