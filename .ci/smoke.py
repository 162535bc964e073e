"""What the wheel must do where there is nothing but torch: a training step and an evaluation of a block, in C++."""

import copy

import torch

import vcr_ops

torch.manual_seed(0)
block = vcr_ops.VCRBlock(256, 64)
x = torch.randn(2, 256, 14, 14, requires_grad=True)
step = {}
for backend in ("cpp", "composite"):
    fresh = copy.deepcopy(block)  # a training step moves running statistics
    with vcr_ops.use_backend(backend):
        out = fresh.train()(x)
        step[backend] = (out, *torch.autograd.grad(out.square().mean(), [x, *fresh.parameters()]), fresh.eval()(x))
for ours, plain in zip(*step.values(), strict=True):
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
print(vcr_ops.__file__, "works: C++ and composite agree")
