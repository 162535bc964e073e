"""What two processes (gloo) find, each with a part of the images, for test_sync_batch_norm.py."""

import copy
import functools
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vcr_ops
from tests.closeness import MINIMUM_DRAWS, Result
from tests.grid import Case
from tests.ops.vcr_middle import VcrMiddle
from tests.small import BACKENDS, VARIANTS, enliven, feature_map
from vcr_ops.collectives import Group, group_of
from vcr_ops.ops.vcr_middle.synced import vcr_middle_synced

NAMES = (
    *("y", "norm_mean", "norm_var", "norm_weight", "norm_bias", "value", "query", "key", "logit", "edge"),
    *("state_mean", "state_var", "state_weight", "state_bias"),
    *("scale_weight", "shift_weight", "scale_bias", "shift_bias"),
)


class Synced(VcrMiddle):
    """The middle in steps, over a group of processes or this one alone."""

    group: Group | None = None

    def ours(self, inputs: Any, case: Any, backend: str) -> Any:
        arguments = (
            *(inputs.get(name) for name in NAMES),
            *(case.norm, 1e-5, 1e-5, case.sampler, case.edges, case.modulation),
        )
        out, *statistics = vcr_middle_synced(backend, arguments, self.group, self.group)
        names = ("norm_mean", "norm_var", "state_mean", "state_var")
        wanted = (*(("norm_mean", "norm_var") if case.norm == "batch" else ()),)
        wanted += ("state_mean", "state_var") if case.state == "batch" else ()
        return {"out": out, **{n: x for n, x in zip(names, statistics, strict=True) if n in wanted}}


TWO = [
    Case("vcr_middle", "dynamic", "dynamic", "channel", "both", "batch", "batch", size="N3C4p16S49"),
    Case("vcr_middle", "dynamic", "static", "pixel", "scale", "batch", "batch", layout="channels_last"),
    Case("vcr_middle", "static", "none", "pixel", "both", "batch", "batch", size="N2C2p8S257", dtype="f64"),
    Case("vcr_middle", "pool", "dynamic", "channel", "shift", "batch", "batch", size="N2C32p4S63", dtype="bf16"),
    Case("vcr_middle", "dynamic", "dynamic", "channel", "both", "batch", "given", size="N2C3p1S15", offset="offset"),
    Case("vcr_middle", "static", "dynamic", "channel", "both", "none", "batch", size="N2C4p3S7", layout="permuted"),
    Case("vcr_middle", "dynamic", "dynamic", "pixel", "both", "given", "batch", size="N2C3p32S49"),
]


def part_of(rank: int, n: int) -> slice:
    """One image for the first process, the others for the second."""
    return slice(0, 1) if rank == 0 else slice(1, n)


def draws(rank: int, backend: str) -> dict[str, list[Result]]:
    adapter = Synced()
    adapter.group = group_of(None)
    found: dict[str, list[Result]] = {}
    for case in TWO if backend == "cpp" else TWO[:2]:
        found[case.id] = []
        for index in range(MINIMUM_DRAWS):
            inputs, gradients = adapter.draw(case, index)
            mine = part_of(rank, inputs["y"].shape[0])
            inputs = {**inputs, "y": inputs["y"][mine]}
            gradients = {**gradients, "out": gradients["out"][mine]}
            result = adapter.our_result(inputs, gradients, case, backend)
            found[case.id].append(Result(result.outputs, result.gradients))
    return found


class Exchanges(TorchDispatchMode):
    """The numbers that functional collectives send, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace and "wait" not in func.name():
            self.sent.append((func.name().split("::")[1], args[0].numel()))
        return func(*args, **(kwargs or {}))


def make(backend: str, variant: str = "default", **options: Any) -> Any:
    """A middle of 3 concepts of 4 channels in float64, with two plain batch norms."""
    torch.manual_seed(0)
    m = vcr_ops.VisualConceptReasoning(12, 3, backend=backend, **VARIANTS[variant], **options)
    return enliven(m).double()


def synced(module: nn.Module, group: Any = None) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module), group)


def images(n: int, seed: int = 1) -> Tensor:
    return 2 + 3 * feature_map(n, 12, 4, 5, seed=seed, dtype=torch.float64)


def step(module: Any, y: Tensor, grad: Tensor, call: Any = None) -> dict[str, Tensor]:
    """As ``small.results``, but the module itself moves on."""
    y = y.clone().requires_grad_()
    out = (module if call is None else call)(y)
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
    grads = torch.autograd.grad(out, [y, *parameters], grad)
    found = {"out": out.detach(), "dy": grads[0]}
    found |= {f"d{name}": g for name, g in zip(names, grads[1:], strict=True)}
    return found | {name: b.detach().clone() for name, b in module.named_buffers()}


def both(rank: int, module: Any, mine: slice, n: int = 5, steps: int = 1, call: Any = None) -> list[Any]:
    found = []
    for seed in range(1, steps + 1):
        y, grad = images(n, seed), feature_map(n, 12, 4, 5, seed=seed + 10, dtype=torch.float64)
        found.append(step(module, y[mine], grad[mine], call))
    return found


MOMENTA = {"tenth": 0.1, "cumulative": None}
PARTS = {"unequal": ((0, 2), (2, 5)), "empty": ((0, 0), (0, 5)), "one-image": ((0, 1), (1, 5))}
STEPS = [
    ("unequal", "default", "tenth"),
    ("unequal", "pixel", "cumulative"),
    ("empty", "default", "cumulative"),
    ("empty", "pool", "tenth"),
    ("one-image", "pixel", "tenth"),
]


def setups(backend: str) -> dict[str, Any]:
    """Modules whose norms are partly something else."""
    frozen = make(backend)
    frozen.bn.eval()
    local = make(backend)
    group_norm = make(backend, norm_layer=lambda channels: nn.GroupNorm(3, channels))
    still = make(backend)
    still.reasoner.bn.eval()
    untracked = make(backend)
    untracked.bn = nn.BatchNorm2d(12, track_running_stats=False, affine=False).double()
    return {
        "frozen-bn": frozen,
        "group-norm": group_norm,
        "states-frozen": still,
        "untracked": untracked,
        "local-bn": local,
    }


def synced_setup(name: str, module: Any) -> Any:
    done = synced(module)
    if name == "local-bn":  # its statistics stay those of the process
        done.bn = copy.deepcopy(module.bn)
    for norm in ("bn", "reasoner.bn"):
        done.get_submodule(norm).training = module.get_submodule(norm).training
    return done


def compiled(rank: int, backend: str) -> dict[str, Any]:
    graphs: list[str] = []

    def look(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph.print_readable(print_output=False))
        return aot_eager(graph, inputs)

    found: dict[str, Any] = {}
    for variant in ("default", "pixel") if backend == "cpp" else ("default",):
        m = synced(make(backend, variant))
        mine = slice(0, 2) if rank == 0 else slice(2, 5)
        call = torch.compile(m, fullgraph=True, backend=look)
        found[variant] = both(rank, m, mine, call=call)
    found["graphs"] = len(graphs)
    names = ("all_gather_into_tensor", "all_reduce")
    found["exchanges"] = [name for name in names if f"{name}(" in graphs[0]]
    if backend == "cpp":
        m, mine = synced(make(backend)), slice(0, 2) if rank == 0 else slice(2, 5)
        found["inductor"] = both(rank, m, mine, call=torch.compile(m, fullgraph=True))
    return found


def network() -> Any:
    torch.manual_seed(0)
    net = vcr_ops.VCRNet((1, 1, 1, 1), 5, groups=4, width_per_group=1)
    return enliven(net).double()


def ddp(rank: int, backend: str) -> list[dict[str, Tensor]]:
    """A whole network, each of its norms synchronised, trained for two steps under DistributedDataParallel."""
    with vcr_ops.use_backend(backend):
        net = vcr_ops.SyncBatchNorm.convert_sync_batchnorm(network())
        return train(net, DistributedDataParallel(net), slice(0, 2) if rank == 0 else slice(2, 4))


def train(net: nn.Module, call: Any, mine: slice) -> list[dict[str, Tensor]]:
    found = []
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for seed in range(2):
        optimizer.zero_grad()
        out = call(feature_map(4, 3, 40, 40, seed=seed, dtype=torch.float64)[mine])
        out.square().mean().backward()
        grads = {f"d{name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        found.append({"out": out.detach(), **grads, **{name: b.clone() for name, b in net.named_buffers()}})
        optimizer.step()
    return found


def scenarios(rank: int, backend: str) -> dict[str, Any]:
    found: dict[str, Any] = {"draws": draws(rank, backend)}
    for name, variant, momentum in STEPS:
        m = make(backend, variant)
        m.bn.momentum = m.reasoner.bn.momentum = MOMENTA[momentum]
        found[f"{name}-{variant}-{momentum}"] = both(rank, synced(m), slice(*PARTS[name][rank]), steps=3)
    for name, module in setups(backend).items():
        found[name] = both(rank, synced_setup(name, module), slice(0, 2) if rank == 0 else slice(2, 5), steps=2)
    # Who talks when.
    m = synced(make(backend))
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    for name, mode in (("training", True), ("evaluation", False)):
        with Exchanges() as seen:
            m.train(mode)
            both(rank, m, mine)
        found[f"exchanges-{name}"] = seen.sent
    m.train()
    m.bn.eval(), m.reasoner.bn.eval()
    with Exchanges() as seen:
        both(rank, m, mine)
    found["exchanges-frozen"] = seen.sent
    with Exchanges() as seen, torch.no_grad():
        m.train()(images(5)[mine])
    found["exchanges-no_grad"] = seen.sent
    # process_group
    alone = [dist.new_group([r]) for r in range(2)][rank]
    found["group-alone"] = both(rank, synced(make(backend), alone), mine)
    pair = dist.new_group([0, 1])
    found["group-pair"] = both(rank, synced(make(backend), pair), mine)
    # Modules by themselves, and with a hook
    reasoner = synced(make(backend)).reasoner
    h = feature_map(5, 3, 4, dtype=torch.float64)
    out = reasoner(h[mine])
    found["reasoner"] = (out.detach(), reasoner.bn.running_var.clone(), int(reasoner.bn.num_batches_tracked))
    hooked = make(backend)
    hooked.reasoner = synced(hooked.reasoner)
    hooked.bn.eval()
    hooked.sampler.register_forward_hook(lambda *_: None)
    found["hooked"] = both(rank, hooked, mine)
    # Recomputation, and autocast
    m = synced(make(backend))
    moves_once = lambda: (nullcontext(), vcr_ops.no_running_stats_update())  # noqa: E731
    again = lambda y: checkpoint(m, y, use_reentrant=False, context_fn=moves_once)  # noqa: E731
    found["checkpointed"] = both(rank, m, mine, call=again)
    m = synced(make(backend)).float()
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = m(images(5)[mine].bfloat16()).detach()
    found["explained"] = str(vcr_ops.explain(m, images(5)[mine].float()))
    # Errors, on every process alike
    module = synced(make("auto"))
    try:
        torch.func.grad(lambda y: module(y).sum())(images(2))
    except RuntimeError as error:
        found["error-func"] = str(error)
    try:
        synced(make(backend))(images(2).flatten(1))
    except ValueError as error:
        found["error-dims"] = str(error)
    if backend == "cpp":
        try:
            y = images(2).requires_grad_()
            torch.autograd.grad(synced(make(backend))(y).square().sum(), y, create_graph=True)[0].sum().backward()
        except NotImplementedError as error:
            found["error-twice"] = str(error)
    else:
        y = images(2, seed=rank).requires_grad_()
        (first,) = torch.autograd.grad(synced(make(backend))(y).square().sum(), y, create_graph=True)
        first.square().sum().backward()
        found["twice"] = y.grad
    found["compiled"] = compiled(rank, backend)
    found["ddp"] = ddp(rank, backend)
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        found = {backend: scenarios(rank, backend) for backend in BACKENDS}
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@functools.cache
def found_by_both() -> tuple[Any, Any]:
    """By each process and backend. They run once: to start one takes as long as much of what it does."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder,), nprocs=2)
        first, second = (torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2))
    return first, second
