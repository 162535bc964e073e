"""Proves: what interpreter_patches.py puts in the place of Triton's own gives what a GPU gives."""

import math

import pytest
import torch

pytestmark = pytest.mark.triton


def test_float32_is_rounded_to_bfloat16_as_pytorch_does() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    ties = torch.arange(512, dtype=torch.int32).mul(0x8000).add(0x3F800000).view(torch.float32)
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4096, generator=generator) * torch.randn(4096, generator=generator).mul(20).exp2()
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 1e-40])
    x = torch.cat([ties, -ties, ties + 1e-6, spread, ends])
    for values in (x, x.view(-1, 4).t()):  # of any strides
        found = interpreter._convert_float(values.numpy(), tl.float32, tl.bfloat16, None)
        assert found.dtype == np.uint16
        rounded = torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
        assert torch.equal(rounded.isnan(), values.isnan())
        assert torch.equal(rounded.nan_to_num(0), values.bfloat16().nan_to_num(0))


def test_operands_get_the_interpreter_s_own_types() -> None:
    """Remembered or not: shapes, types and values of what two operands make are NumPy's."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import TensorHandle

    semantic = interpreter.TritonSemantic(interpreter.interpreter_builder)
    dtypes = {tl.int32: np.int32, tl.int64: np.int64, tl.float32: np.float32, tl.float64: np.float64}
    shapes = [(4,), (2, 1), (1, 4), (2, 4), (2, 1, 4)]
    generator = np.random.default_rng(0)

    def tensor(dtype, shape):
        data = generator.integers(-9, 9, shape).astype(dtypes[dtype])
        return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(shape)))

    operations = [(semantic.add, np.add), (semantic.sub, np.subtract), (semantic.mul, np.multiply)]
    for a in dtypes:
        for b in dtypes:
            wanted = a if a == b else next(x for x in (tl.float64, tl.float32, tl.int64) if x in (a, b))
            for _ in range(2):  # the second time from memory
                for shape in shapes:
                    x, y = tensor(a, shape), tensor(b, (1, 4))
                    for ours, numpys in operations:
                        found = ours(x, y, True)
                        expected = numpys(x.handle.data, y.handle.data)
                        assert found.dtype == wanted
                        assert tuple(int(n) for n in found.type.shape) == expected.shape == found.handle.data.shape
                        assert found.handle.data.dtype == dtypes[wanted]
                        assert np.array_equal(found.handle.data, expected)
        for number in (0.0, 2, 0.5):
            x = tensor(a, (2, 4))
            for _ in range(2):
                assert np.array_equal(semantic.mul(x, number, True).handle.data, x.handle.data * number)
