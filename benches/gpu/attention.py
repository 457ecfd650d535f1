"""Attention for Hopper: checks against f64, then times beside PyTorch's on the same card.

    python3 benches/gpu/attention.py

Needs PyTorch with CUDA and a Hopper card. FLOPs are counted as FlashAttention does: 2 B S^2 D H forward (causal), 2.5
times that backward.
"""

import ctypes
import math

import torch
import torch.nn.functional as F
from driver import Card, compile_all, f32, pointer, u32, u64

FORWARD = ["common", "hopper", "attention_hopper", "attention_hopper_forward"]
BACKWARD = ["common", "hopper", "attention_hopper", "attention_hopper_turned"]
ROWS = 128


class Shape(ctypes.Structure):
    _fields_ = [("heads", ctypes.c_uint32), ("group", ctypes.c_uint32), ("scale", ctypes.c_float),
                ("cap", ctypes.c_float), ("window", ctypes.c_uint32)]


class Target(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64), ("stride", ctypes.c_uint64)]


def target(x):
    return Target(x.data_ptr(), x.stride(0))


def tables(spans, rows):
    """Tiles of queries and of keys, as attention/tiles.rs lists them."""
    order = sorted(range(len(spans)), key=lambda number: -spans[number][3])
    queries = [(number, first) for number in order for first in reversed(range(0, spans[number][1], rows))]
    keys = [(number, first) for number in order for first in range(0, spans[number][3], rows)]
    return torch.tensor(queries, dtype=torch.int32).cuda(), torch.tensor(keys, dtype=torch.int32).cuda()


class Variant:
    """One way of tiling: compiled, loaded and launched."""

    def __init__(self, card, dim, cap=False, forward=None, dkv=None, dq=None, ping=True, flags=()):
        wide = dim > 128
        self.card, self.dim, self.flags = card, dim, flags
        self.block, self.stages = forward or {64: (128, 3), 256: (64, 2)}.get(dim, (128, 2))
        self.dkv = dkv or ((96, 3) if dim == 64 and not cap else (32 if cap else 64, 2 if wide else 4))
        self.dq = dq or {64: (96, 3), 256: (32, 2)}.get(dim, (64, 4))
        self.key_rows = 64 if wide else ROWS
        base = [f"-DHEAD_DIM={dim}", *(["-DSOFT_CAP"] if cap else []), *(["-DPING_PONG"] if ping else []), *flags]
        self.forward_unit = (FORWARD, [*base, f"-DBLOCK={self.block}", f"-DSTAGES={self.stages}"])
        self.backward_unit = (
            [*BACKWARD, "attention_hopper_dkv_wide" if wide else "attention_hopper_dkv", "attention_hopper_dq"],
            [*base, f"-DDKV_BLOCK={self.dkv[0]}", f"-DDKV_STAGES={self.dkv[1]}", f"-DDQ_BLOCK={self.dq[0]}",
             f"-DDQ_STAGES={self.dq[1]}"])

    def load(self, codes):
        card, tile, spare = self.card, lambda rows: rows * self.dim * 2, 1536
        module = card.module(codes[0])
        shared = tile(ROWS) + 2 * self.stages * tile(self.block) + spare
        self.k_forward = card.kernel(module, "attention_hopper_forward", shared)
        module = card.module(codes[1])
        block, stages = self.dkv
        shared = 2 * tile(self.key_rows) + stages * (2 * tile(block) + 8 * block) + spare
        self.k_dkv = card.kernel(module, "attention_hopper_dkv", shared)
        self.k_statistics = card.kernel(module, "attention_hopper_statistics")
        block, stages = self.dq
        self.k_dq = card.kernel(module, "attention_hopper_dq", 2 * tile(ROWS) + stages * 2 * tile(block) + spare)

    def prepare(self, q, k, v, heads, kv_heads, spans, scale=None, window=0, cap=0.0):
        dim, card = self.dim, self.card
        self.q, self.k, self.v = q, k, v
        self.heads, self.kv_heads = heads, kv_heads
        self.spans = torch.tensor(spans, dtype=torch.int32).cuda()
        self.q_tiles, self.k_tiles = tables(spans, ROWS)
        self.shape = Shape(heads, heads // kv_heads, scale or dim**-0.5, cap, window)
        self.map = lambda x, h, rows: card.tensor_map(x, h * dim, rows, dim)
        self.f_maps = [self.map(q, heads, ROWS)] + [self.map(x, kv_heads, self.block) for x in (k, v)]
        self.counters = torch.zeros(3, dtype=torch.int32, device="cuda")
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count
        self.out = torch.full((q.shape[0] + SPARE, heads * dim), float("nan"), dtype=torch.bfloat16, device="cuda")
        self.log_sum = torch.full((q.shape[0] + SPARE, heads), float("nan"), device="cuda")
        return self

    def forward(self):
        items = self.q_tiles.shape[0] * self.heads
        self.k_forward((min(items, self.sms),), (384,), *self.f_maps, pointer(self.spans), pointer(self.q_tiles),
                       u32(items), pointer(self.counters), self.shape, target(self.out), pointer(self.log_sum), u64(self.log_sum.stride(0)))

    def prepare_backward(self, dout):
        q, k, v, m = self.q, self.k, self.v, self.map
        b = self.dkv[0]
        self.dkv_maps = [m(q, self.heads, b), m(k, self.kv_heads, self.key_rows), m(v, self.kv_heads, self.key_rows),
                         m(dout, self.heads, b)]
        b = self.dq[0]
        self.dq_maps = [m(q, self.heads, ROWS), m(k, self.kv_heads, b), m(v, self.kv_heads, b), m(dout, self.heads, ROWS)]
        self.dout = dout
        self.statistics = torch.full((self.heads, q.shape[0], 2), float("nan"), device="cuda")
        nan = lambda rows, h: torch.full((rows + SPARE, h * self.dim), float("nan"), dtype=torch.bfloat16, device="cuda")
        self.gq, self.gk, self.gv = nan(len(q), self.heads), nan(len(k), self.kv_heads), nan(len(k), self.kv_heads)
        return self

    def run_statistics(self):
        rows = self.q.shape[0]
        step = 256 // (8 if self.dim <= 64 else 16 if self.dim <= 128 else 32)
        self.k_statistics(((rows + step - 1) // step, self.heads), (256,), pointer(self.dout), u64(self.dout.stride(0)),
                          pointer(self.out), u64(self.out.stride(0)), pointer(self.log_sum), u64(self.log_sum.stride(0)),
                          u32(rows), pointer(self.statistics))

    def run_dkv(self):
        items = self.k_tiles.shape[0] * (ROWS // self.key_rows) * self.kv_heads
        self.k_dkv((min(items, self.sms),), (384,), *self.dkv_maps, pointer(self.spans), pointer(self.k_tiles), u32(items),
                   pointer(self.counters[1:]), self.shape, pointer(self.statistics), u32(self.q.shape[0]), target(self.gk), target(self.gv))

    def run_dq(self):
        items = self.q_tiles.shape[0] * self.heads
        self.k_dq((min(items, self.sms),), (384,), *self.dq_maps, pointer(self.spans), pointer(self.q_tiles), u32(items),
                  pointer(self.counters[2:]), self.shape, pointer(self.statistics), u32(self.q.shape[0]), target(self.gq))

    def backward(self):
        self.run_statistics()
        self.run_dkv()
        self.run_dq()


def reference(q, k, v, heads, kv_heads, dim, spans, scale, window, cap, dout):
    """Everything in f64, by PyTorch's own gradients."""
    leaf = lambda x: x.double().detach().requires_grad_()
    q, k, v = leaf(q), leaf(k), leaf(v)
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
        b, c = b.repeat_interleave(heads // kv_heads, 0), c.repeat_interleave(heads // kv_heads, 0)
        s = a @ b.transpose(1, 2) * scale
        if cap:
            s = cap * torch.tanh(s / cap)
        s = s.masked_fill(~seen, float("-inf"))
        logs[qs:qs + qn] = torch.logsumexp(s, -1).T.detach()
        outs.append((s.softmax(-1) @ c).transpose(0, 1).reshape(qn, heads * dim))
    out = torch.cat(outs)
    grads = torch.autograd.grad((out * dout.double()).sum(), [q, k, v])
    return out.detach(), logs, grads


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# Rows behind a matrix, full of NaN: neither read into results nor written.
SPARE = 3
# Lengths of spans, keys ahead of each, heads, key heads, window.
CASES = [
    ([256], 0, 2, 2, 0),
    ([1000], 0, 4, 1, 0),
    ([1, 77, 128, 513, 300, 5], 0, 4, 2, 0),
    ([129, 640, 200], 0, 4, 2, 100),
    ([300, 77], 20, 4, 2, 0),
    ([513, 40], 150, 2, 1, 64),
    ([1, 3], 400, 8, 2, 0),
]


def check(variant, cap=0.0, tolerance=(4e-3, 6e-3)):
    """Everything against f64 on fresh random inputs; outputs are poisoned; two runs must give the same bits."""
    dim, worst, bad = variant.dim, {}, []
    for number, (lengths, ahead, heads, kv_heads, window) in enumerate(CASES):
        total, all_keys = sum(lengths), sum(lengths) + ahead * len(lengths)
        poisoned = lambda rows, columns: torch.cat([torch.randn(rows, columns, device="cuda").bfloat16(),
                                                    torch.full((SPARE, columns), float("nan"), device="cuda").bfloat16()])
        q = poisoned(total, (heads + 1) * dim)[:total, dim:]
        k, v = poisoned(all_keys, 2 * kv_heads * dim)[:all_keys].split(kv_heads * dim, 1)
        dout = poisoned(total, heads * dim)[:total]
        if cap:
            q.mul_(4)
        spans, at, key_at = [], 0, 0
        for n in lengths:
            spans.append((at, n, key_at, n + ahead))
            at, key_at = at + n, key_at + n + ahead
        scale = dim**-0.5
        want, logs, grads = reference(q, k, v, heads, kv_heads, dim, spans, scale, window, cap, dout)
        variant.prepare(q, k, v, heads, kv_heads, spans, scale, window, cap)
        variant.forward()
        variant.prepare_backward(dout)
        variant.backward()
        torch.cuda.synchronize()
        results = {"out": error(variant.out[:total], want), "lse": error(variant.log_sum[:total], logs)}
        got = {"dq": variant.gq, "dk": variant.gk, "dv": variant.gv}
        for (name, value), wanted in zip(got.items(), grads):
            results[name] = error(value[: len(wanted)], wanted)
        for name, value in [("out", variant.out), *got.items()]:
            if not bool(value[-SPARE:].isnan().all()):
                bad.append(f"case {number}: {name} written past its end")
        first = [value.clone() for value in got.values()]
        variant.backward()
        torch.cuda.synchronize()
        if bool(variant.counters.any()):
            bad.append(f"case {number}: a counter is not 0 at the end")
        for name, a, b in zip(got, first, got.values()):
            if not torch.equal(a[:-SPARE], b[:-SPARE]):
                bad.append(f"case {number}: two runs of {name} differ")
        for name, value in results.items():
            worst[name] = max(worst.get(name, 0.0), value) if value == value else float("nan")
            limit = tolerance[0] if name in ("out", "lse") else tolerance[1]
            if not value <= limit:
                bad.append(f"case {number}: {name} off by {value:.3g}")
    print("  errors", {name: f"{value:.2e}" for name, value in worst.items()}, "BAD" if bad else "ok", *bad[:6], flush=True)
    return not bad


def compare(runs, rounds=12):
    """Median milliseconds of each of {name: call}. They take turns, so that all see the card equally warm, and are queued
    without waiting, so that none pays for the host."""
    times = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            if turn >= 2:
                times[name].append((start, end))
    torch.cuda.synchronize()
    times = {name: sorted(start.elapsed_time(end) for start, end in each) for name, each in times.items()}
    return {name: each[len(each) // 2] for name, each in times.items()}


def inputs(batch, length, heads, kv_heads, dim):
    total = batch * length
    qkv = torch.randn(total, (heads + 2 * kv_heads) * dim, device="cuda").bfloat16()
    q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    dout = torch.randn(total, heads * dim, device="cuda").bfloat16()
    spans = [(i * length, length, i * length, length) for i in range(batch)]
    return q, k, v, dout, spans


def floating(batch, length, heads, dim):
    return 4 * length * length * dim * heads * batch / 2


def torch_runs(batch, length, heads, kv_heads, dim):
    """PyTorch's attention on inputs of its own."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    runs = {}
    for name, which in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FlashAttention-2", SDPBackend.FLASH_ATTENTION)):
        q, k, v = (torch.randn(batch, length, h, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
                   for h in (heads, kv_heads, kv_heads))
        dout = torch.randn_like(q)

        def call(q=q, k=k, v=v, which=which):
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        try:
            out = call()
            grad = lambda out=out, q=q, k=k, v=v, dout=dout: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            grad()
        except RuntimeError as problem:
            print(f"  {name}: {problem}")
            continue
        runs[f"{name} forward"], runs[f"{name} backward"] = call, grad
    return runs


def time(variants, batch, length, heads, kv_heads, dim, peers=True, parts=False, rounds=12, **more):
    """Times {name: variant} in turns, PyTorch's attention among them."""
    q, k, v, dout, spans = inputs(batch, length, heads, kv_heads, dim)
    flops = floating(batch, length, heads, dim)
    runs = {}
    for name, variant in variants.items():
        variant.prepare(q, k, v, heads, kv_heads, spans, **more)
        variant.forward()
        variant.prepare_backward(dout)
        runs[f"{name} forward"], runs[f"{name} backward"] = variant.forward, variant.backward
        if parts:
            variant.backward()
            runs[f"{name} statistics"], runs[f"{name} dkv"], runs[f"{name} dq"] = (
                variant.run_statistics, variant.run_dkv, variant.run_dq)
    if peers:
        runs.update(torch_runs(batch, length, heads, kv_heads, dim))
    print(f"{batch} x {length}, {heads} heads over {kv_heads} of {dim} {more or ''}")
    share = {"forward": 1.0, "backward": 2.5, "dkv": 2.0, "dq": 1.5}
    for name, ms in compare(runs, rounds).items():
        factor = share.get(name.split()[-1])
        rate = f"{factor * flops / ms / 1e9:6.0f} TFLOP/s" if factor else ""
        print(f"  {name:40} {ms:8.3f} ms {rate}", flush=True)


def main():
    torch.zeros(1, device="cuda")
    card = Card()
    variants = {(dim, cap): Variant(card, dim, cap=cap) for dim in (64, 96, 128, 256) for cap in (False, True)}
    units = {(key, part): unit for key, variant in variants.items()
             for part, unit in enumerate((variant.forward_unit, variant.backward_unit))}
    done = compile_all(units)
    good = True
    for key, variant in variants.items():
        variant.load([done[key, part][0] for part in (0, 1)])
        print(key)
        good &= check(variant, 30.0 if key[1] else 0.0)
    if not good:
        raise SystemExit("wrong results")
    print(torch.cuda.get_device_name())
    ours = {"ours": variants[128, False]}
    time(ours, 4, 4096, 32, 8, 128, parts=True)
    time(ours, 4, 2048, 32, 8, 128)
    time(ours, 1, 4096, 32, 8, 128)
    time(ours, 1, 32768, 32, 8, 128)
    time({"ours": variants[64, False]}, 8, 2048, 32, 8, 64)
    time({"ours": variants[96, False]}, 4, 4096, 32, 32, 96)
    time({"ours": variants[256, False]}, 4, 4096, 16, 8, 256)


if __name__ == "__main__":
    main()
