"""The sides of a comparison on a GPU: those of the CPU with the GPU's backend, eager, compiled and max-autotuned."""

from __future__ import annotations

from dataclasses import replace

from ..providers import PROVIDERS, Provider, _needs, _needs_compiler, _product
from .device import Device

# Without CUDA graphs of its own: every side is captured in one anyway, by the same means.
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


def product_of(device: Device, backend: str, name: str = "fused") -> Provider:
    """What is measured: a backend of vcr_ops."""
    return Provider(name, device.backends[backend], "product", _product(backend), _needs(backend, device.name))


def gpu_providers(device: Device) -> dict[str, Provider]:
    """All sides by name. Those that are compiled follow the one that they are compiled from."""
    product = product_of(device, device.backend)
    composite = replace(PROVIDERS["composite"], why_not=_needs("composite", device.name))
    compiled = replace(
        product,
        name="fused_compiled",
        title=f"{product.title} compiled",
        why_not=_needs_compiler(product.why_not),
        eager="fused",
    )
    sides = [product, compiled]
    for eager in (PROVIDERS["reference"], composite, PROVIDERS["plain"]):
        sides.append(eager)
        for suffix, mode in (("compiled", None), ("max_autotune", MAX_AUTOTUNE)):
            sides.append(
                replace(
                    eager,
                    name=f"{eager.name}_{suffix}",
                    title=f"{eager.title.removesuffix(' ResNeXt')} {suffix.replace('_', '-')}",
                    why_not=_needs_compiler(eager.why_not),
                    eager=eager.name,
                    compile_mode=mode,
                )
            )
    return {side.name: side for side in sides}
