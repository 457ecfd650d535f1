"""Attention for Hopper: checks against f64, then times beside PyTorch's on the same card.

    python3 attention.py [--quick]
"""

import ctypes
import math
import sys

import torch
import torch.nn.functional as F
from driver import Card, compile_all, f32, pointer, u32, u64

FORWARD = ["common", "hopper", "attention_hopper", "attention_hopper_forward"]
BACKWARD = ["common", "hopper", "attention_hopper", "attention_hopper_dkv", "attention_hopper_dq"]


class Shape(ctypes.Structure):
    _fields_ = [("heads", ctypes.c_uint32), ("group", ctypes.c_uint32), ("scale", ctypes.c_float),
                ("cap", ctypes.c_float), ("window", ctypes.c_uint32), ("prefix", ctypes.c_uint32)]


class Target(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64), ("stride", ctypes.c_uint64)]


def target(x):
    return Target(x.data_ptr(), x.stride(0))


def tables(spans, rows, window):
    """Tiles of queries and of keys, longest work first."""
    queries, keys = [], []
    for number, (_, q, _, k) in enumerate(spans):
        past = k - q
        for first in range(0, q, rows):
            seen = min(k, first + rows + past)
            queries.append((min(seen, window + rows) if window else seen, number, first))
        for first in range(0, k, rows):
            seen = q - max(0, first - past)
            keys.append((min(seen, window + rows) if window else seen, number, first))
    order = lambda tiles: torch.tensor([t[1:] for t in sorted(tiles, key=lambda t: -t[0])], dtype=torch.int32).cuda()
    return order(queries), order(keys)


class Variant:
    """One way of tiling: compiled, loaded and launched."""

    def __init__(self, card, dim, groups=2, block=128, stages=2, ping=True, cap=False, dkv=(64, 4), dq=(64, 4)):
        self.card, self.dim, self.groups, self.block, self.stages = card, dim, groups, block, stages
        self.dkv, self.dq = dkv, dq
        cap = ["-DSOFT_CAP"] if cap else []
        base = [f"-DHEAD_DIM={dim}"]
        self.forward_unit = (FORWARD, base + [f"-DGROUPS={groups}", f"-DBLOCK={block}", f"-DSTAGES={stages}"]
                             + (["-DPING_PONG"] if ping else []) + cap)
        self.backward_unit = (BACKWARD, base + [f"-DDKV_BLOCK={dkv[0]}", f"-DDKV_STAGES={dkv[1]}", f"-DDQ_BLOCK={dq[0]}",
                                                f"-DDQ_STAGES={dq[1]}"] + cap)

    def load(self, codes):
        dim, tile = self.dim, lambda rows: rows * self.dim * 2
        spare = 1024 + 512
        rows = 64 * self.groups
        card = self.card
        if self.forward_unit is not None:
            module = card.module(codes[0])
            self.k_forward = card.kernel(module, "attention_hopper_forward",
                                         tile(rows) + 2 * self.stages * tile(self.block) + spare)
        if self.backward_unit is not None:
            module = card.module(codes[1])
            block, stages = self.dkv
            shared = 2 * tile(128) + stages * (2 * tile(block) + 8 * block) + spare
            self.k_dkv = card.kernel(module, "attention_hopper_dkv", shared)
            self.k_prefix = card.kernel(module, "attention_hopper_prefix", shared)
            self.k_prefix_sum = card.kernel(module, "attention_hopper_prefix_sum")
            self.k_statistics = card.kernel(module, "attention_hopper_statistics")
            block, stages = self.dq
            self.k_dq = card.kernel(module, "attention_hopper_dq", 2 * tile(128) + stages * 2 * tile(block) + spare)

    def prepare(self, q, k, v, heads, kv_heads, spans, scale=None, window=0, cap=0.0, prefix=None, persistent=True):
        dim, card = self.dim, self.card
        self.q, self.k, self.v = q, k, v
        self.heads, self.kv_heads = heads, kv_heads
        self.spans = torch.tensor(spans, dtype=torch.int32).cuda()
        self.tiles = tables(spans, 64 * self.groups, window)[0]
        self.q_tiles, self.k_tiles = tables(spans, 128, window)
        self.prefix = prefix
        count = prefix[0].shape[0] if prefix else 0
        pk, pv = prefix if prefix else (k, v)
        self.shape = Shape(heads, heads // kv_heads, scale or dim**-0.5, cap, window, count)
        m = lambda x, h, rows: card.tensor_map(x, h * dim, rows, dim)
        self.f_maps = [m(q, heads, 64 * self.groups)] + [m(x, kv_heads, self.block) for x in (k, v, pk, pv)]
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count if persistent else 1 << 30
        rows = q.shape[0]
        self.out = torch.full((rows, heads * dim), float("nan"), dtype=torch.bfloat16, device="cuda")
        self.log_sum = torch.full((rows, heads), float("nan"), device="cuda")
        return self

    def forward(self):
        items = self.tiles.shape[0] * self.heads
        self.k_forward((min(items, self.sms),), (128 * (self.groups + 1),), *self.f_maps, pointer(self.spans),
                       pointer(self.tiles), u32(items), self.shape, target(self.out), pointer(self.log_sum),
                       u64(self.log_sum.stride(0)))

    def prepare_backward(self, dout, out=None, log_sum=None):
        dim, card = self.dim, self.card
        q, k, v = self.q, self.k, self.v
        if out is not None:
            self.out, self.log_sum = out, log_sum
        pk, pv = self.prefix if self.prefix else (k, v)
        m = lambda x, h, rows: card.tensor_map(x, h * dim, rows, dim)
        b = self.dkv[0]
        self.dkv_maps = [m(q, self.heads, b), m(k, self.kv_heads, 128), m(v, self.kv_heads, 128), m(dout, self.heads, b)]
        self.prefix_maps = [self.dkv_maps[0], m(pk, self.kv_heads, 128), m(pv, self.kv_heads, 128), self.dkv_maps[3]]
        b = self.dq[0]
        self.dq_maps = [m(q, self.heads, 128), m(k, self.kv_heads, b), m(v, self.kv_heads, b), m(dout, self.heads, 128),
                        m(pk, self.kv_heads, b), m(pv, self.kv_heads, b)]
        self.dout = dout
        rows = q.shape[0]
        self.statistics = torch.full((self.heads, rows, 2), float("nan"), device="cuda")
        nan = lambda h: torch.full((rows, h * dim), float("nan"), dtype=torch.bfloat16, device="cuda")
        self.gq, self.gk, self.gv = nan(self.heads), nan(self.kv_heads), nan(self.kv_heads)
        if self.prefix:
            columns = self.kv_heads * dim
            self.chunk = 1024
            chunks = [(n, f) for n, (_, qs, _, _) in enumerate(self.spans.tolist()) for f in range(0, qs, self.chunk)]
            self.chunks = torch.tensor(chunks, dtype=torch.int32).cuda()
            self.parts = torch.full((len(chunks), 2, self.shape.prefix, columns), float("nan"), device="cuda")
            self.gpk, self.gpv = torch.zeros(self.shape.prefix, columns).cuda(), torch.zeros(self.shape.prefix, columns).cuda()
        return self

    def run_statistics(self):
        rows = self.q.shape[0]
        step = 256 // (8 if self.dim <= 64 else 16 if self.dim <= 128 else 32)
        self.k_statistics(((rows + step - 1) // step, self.heads), (256,), pointer(self.dout), u64(self.dout.stride(0)),
                          pointer(self.out), u64(self.out.stride(0)), pointer(self.log_sum), u64(self.log_sum.stride(0)),
                          u32(rows), pointer(self.statistics))

    def run_dkv(self):
        items = self.k_tiles.shape[0] * self.kv_heads
        self.k_dkv((min(items, self.sms),), (384,), *self.dkv_maps, pointer(self.spans), pointer(self.k_tiles), u32(items),
                   self.shape, pointer(self.statistics), u32(self.q.shape[0]), target(self.gk), target(self.gv))

    def run_dq(self):
        items = self.q_tiles.shape[0] * self.heads
        self.k_dq((min(items, self.sms),), (384,), *self.dq_maps, pointer(self.spans), pointer(self.q_tiles), u32(items),
                  self.shape, pointer(self.statistics), u32(self.q.shape[0]), target(self.gq))

    def run_prefix(self):
        count, columns = len(self.chunks), self.kv_heads * self.dim
        items = (self.shape.prefix + 127) // 128 * count * self.kv_heads
        self.k_prefix((min(items, self.sms),), (384,), *self.prefix_maps, pointer(self.spans), pointer(self.chunks),
                      u32(count), u32(self.chunk), u32(items), self.shape, pointer(self.statistics), u32(self.q.shape[0]),
                      pointer(self.parts))
        self.k_prefix_sum((64,), (256,), pointer(self.parts), u32(count), u32(self.shape.prefix), u32(columns),
                          pointer(self.gpk), u64(columns), pointer(self.gpv), u64(columns))

    def backward(self):
        self.run_statistics()
        self.run_dkv()
        self.run_dq()
        if self.prefix:
            self.run_prefix()


def reference(q, k, v, heads, kv_heads, dim, spans, scale, window, cap, prefix, dout):
    """Everything in f64, by PyTorch's own gradients."""
    leaf = lambda x: x.double().detach().requires_grad_()
    q, k, v = leaf(q), leaf(k), leaf(v)
    pk, pv = (leaf(prefix[0]), leaf(prefix[1])) if prefix else (None, None)
    out, logs = torch.zeros_like(q), torch.zeros(q.shape[0], heads, dtype=torch.float64, device="cuda")
    outs = []
    for qs, qn, ks, kn in spans:
        split = lambda x, h: x.view(-1, h, dim).transpose(0, 1)
        a, b, c = split(q[qs:qs + qn], heads), split(k[ks:ks + kn], kv_heads), split(v[ks:ks + kn], kv_heads)
        i = torch.arange(qn, device="cuda")[:, None] + kn - qn
        j = torch.arange(kn, device="cuda")[None]
        seen = j <= i
        if window:
            seen &= j > i - window
        if prefix:
            b, c = torch.cat([split(pk, kv_heads), b], 1), torch.cat([split(pv, kv_heads), c], 1)
            seen = torch.cat([torch.ones(qn, pk.shape[0], dtype=torch.bool, device="cuda"), seen], 1)
        b, c = b.repeat_interleave(heads // kv_heads, 0), c.repeat_interleave(heads // kv_heads, 0)
        s = a @ b.transpose(1, 2) * scale
        if cap:
            s = cap * torch.tanh(s / cap)
        s = s.masked_fill(~seen, float("-inf"))
        logs[qs:qs + qn] = torch.logsumexp(s, -1).T.detach()
        outs.append((s.softmax(-1) @ c).transpose(0, 1).reshape(qn, heads * dim))
    out = torch.cat(outs)
    leaves = [q, k, v] + ([pk, pv] if prefix else [])
    grads = torch.autograd.grad((out * dout[: out.shape[0]].double()).sum(), leaves)
    return out.detach(), logs, grads


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


CASES = [
    # lengths, heads, kv heads, window, prefix, cap
    ([256], 2, 2, 0, 0, 0.0),
    ([1000], 4, 1, 0, 0, 0.0),
    ([1, 77, 128, 513, 300, 5], 4, 2, 0, 0, 0.0),
    ([129, 640, 200], 4, 2, 100, 0, 0.0),
    ([300, 77], 4, 2, 0, 20, 0.0),
    ([513, 40], 2, 1, 64, 150, 0.0),
]


def check(variant, dim, cap, verbose, backward=True, tolerance=(6e-3, 1e-2)):
    worst, bad = {}, []
    for number, (lengths, heads, kv_heads, window, prefix, _) in enumerate(CASES):
        total = sum(lengths)
        spare = 3  # rows behind the last span: neither read into results nor written
        wide = (heads + 2 * kv_heads) * dim
        qkv = torch.randn(total + spare, wide, device="cuda").bfloat16()
        q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
        if cap:
            q = q * 4
        dout = torch.randn(total + spare, heads * dim, device="cuda").bfloat16()
        pre = [torch.randn(prefix, kv_heads * dim, device="cuda").bfloat16() for _ in range(2)] if prefix else None
        spans, at = [], 0
        for n in lengths:
            spans.append((at, n, at, n))
            at += n
        scale = dim**-0.5
        want, logs, grads = reference(q[:total], k[:total], v[:total], heads, kv_heads, dim, spans, scale, window, cap,
                                      pre, dout)
        variant.prepare(q, k, v, heads, kv_heads, spans, scale, window, cap, pre)
        variant.forward()
        torch.cuda.synchronize()
        results = {"out": error(variant.out[:total], want), "lse": error(variant.log_sum[:total], logs)}
        if not bool(variant.out[total:].isnan().all()):
            bad.append(f"case {number}: wrote past the last span")
        if backward:
            variant.prepare_backward(dout)
            variant.backward()
            torch.cuda.synchronize()
            got = [variant.gq, variant.gk, variant.gv]
            for name, a, b in zip(["dq", "dk", "dv"], got, grads):
                results[name] = error(a[:total], b)
                if not bool(a[total:].isnan().all()):
                    bad.append(f"case {number}: {name} wrote past the last span")
            if prefix:
                results["dpk"], results["dpv"] = error(variant.gpk, grads[3]), error(variant.gpv, grads[4])
            first = [x.clone() for x in got]
            variant.backward()
            torch.cuda.synchronize()
            for a, b in zip(first, got):
                if not torch.equal(a[:total], b[:total]):
                    bad.append(f"case {number}: two runs differ")
        for name, value in results.items():
            worst[name] = max(worst.get(name, 0.0), value) if value == value else float("nan")
            limit = tolerance[0] if name in ("out", "lse") else tolerance[1]
            if not value <= limit:
                bad.append(f"case {number}: {name} off by {value:.3g}")
    print("  errors", {name: f"{value:.2e}" for name, value in worst.items()}, "BAD" if bad else "ok", *bad[:6], flush=True)
    return not bad


def median(run, repeats=12):
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times)[len(times) // 2]


def inputs(batch, length, heads, kv_heads, dim):
    total = batch * length
    qkv = torch.randn(total, (heads + 2 * kv_heads) * dim, device="cuda").bfloat16()
    q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    dout = torch.randn(total, heads * dim, device="cuda").bfloat16()
    spans = [(i * length, length, i * length, length) for i in range(batch)]
    return q, k, v, dout, spans


def floating(batch, length, heads, dim):
    return 4 * length * length * dim * heads * batch / 2


def time_variant(variant, batch, length, heads, kv_heads, dim, backward=True, forward=True, **more):
    q, k, v, dout, spans = inputs(batch, length, heads, kv_heads, dim)
    flops = floating(batch, length, heads, dim)
    variant.prepare(q, k, v, heads, kv_heads, spans, **more)
    text = ""
    if forward:
        ms = median(variant.forward)
        text += f"forward {ms:.3f} ms {flops / ms / 1e9:.0f} TFLOP/s"
    if backward:
        variant.forward()
        variant.prepare_backward(dout)
        parts = [median(f) for f in (variant.run_statistics, variant.run_dkv, variant.run_dq)]
        ms = median(variant.backward)
        text += (f"  backward {ms:.3f} ms {2.5 * flops / ms / 1e9:.0f} TFLOP/s"
                 f" (statistics {parts[0]:.3f}, dkv {parts[1]:.3f}: {2 * flops / parts[1] / 1e9:.0f},"
                 f" dq {parts[2]:.3f}: {1.5 * flops / parts[2] / 1e9:.0f})")
    return text


def time_torch(batch, length, heads, kv_heads, dim):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    flops = floating(batch, length, heads, dim)
    for name, which in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        q, k, v = (torch.randn(batch, h, length, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                   for h in (heads, kv_heads, kv_heads))
        dout = torch.randn_like(q)
        try:
            with sdpa_kernel(which):
                call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                forward = median(call)
                out = call()
                backward = median(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
            print(f"  PyTorch {name}: forward {forward:.3f} ms {flops / forward / 1e9:.0f} backward {backward:.3f} ms"
                  f" {2.5 * flops / backward / 1e9:.0f} TFLOP/s", flush=True)
        except RuntimeError as problem:
            print(f"  PyTorch {name}: {problem}")
