"""Kernels whose time is that of moving bytes: checks, then times against a copy on the same card.

    python3 benches/gpu/passes.py
"""

import ctypes

import torch
from attention import compare, error
from driver import Card, compile_all, f32, pointer, u32

UNIT = ["common", "elementwise", "rows", "nf4", "low_rank"]


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64), ("stride", ctypes.c_uint64), ("rows", ctypes.c_uint32),
                ("columns", ctypes.c_uint32)]


class Nf4(ctypes.Structure):
    _fields_ = [("codes", ctypes.c_uint64), ("scales", ctypes.c_uint64), ("nested", ctypes.c_uint64),
                ("map", ctypes.c_uint64), ("offset", ctypes.c_float), ("block_shift", ctypes.c_uint32),
                ("numbers", ctypes.c_uint64)]


def matrix(x):
    return Matrix(x.data_ptr(), x.stride(0), *x.shape)


def bf16(*shape):
    return torch.randn(*shape, device="cuda").bfloat16()


class LowRank:
    """dp = scale dy B and db += scale dy^T p in one pass over dy."""

    def __init__(self, card, module, rank, stages=4, blocks=132):
        rows, columns = 32, 512
        self.blocks = blocks
        shared = 2 * stages * rows * (columns + 8 + rank + 8) + 8 * rows * rank * 4
        self.rank, self.rows, self.columns = rank, rows, columns
        self.slopes = card.kernel(module, f"low_rank_slopes_{rank}", shared)
        self.sum = card.kernel(module, "low_rank_sum")

    def __call__(self, dy, b, p, scale, dp, db):
        chunks = -(-dy.shape[1] // self.columns)
        splits = max(1, self.blocks // chunks)
        stretch = -(-dy.shape[0] // splits)
        stretch = -(-stretch // self.rows) * self.rows
        splits = -(-dy.shape[0] // stretch)
        key = (dy.shape, splits)
        if getattr(self, "key", None) != key:
            self.key = key
            self.dp_parts = torch.full((chunks, dy.shape[0], self.rank), float("nan"), device="cuda")
            self.db_parts = torch.full((splits, dy.shape[1], self.rank), float("nan"), device="cuda")
        self.slopes((chunks, splits), (256,), matrix(dy), pointer(b), matrix(p), u32(stretch), pointer(self.dp_parts),
                    pointer(self.db_parts))
        self.sum((264,), (256,), pointer(self.dp_parts), u32(chunks), pointer(self.db_parts), u32(splits), f32(scale),
                 matrix(dp), matrix(db))


def main():
    torch.zeros(1, device="cuda")
    card = Card()
    code, log = compile_all({"unit": (UNIT, [])})["unit"]
    module = card.module(code)
    names = ["copy_bf16_bf16", "rms_norm_bf16", "rms_norm_backward_bf16", "nf4_bf16"]
    kernel = {name: card.kernel(module, name) for name in names}
    good, bytes_of, runs = True, {}, {}

    def held(what, value, limit):
        nonlocal good
        good &= value <= limit
        print(f"  {what:44} {value:.2e} {'ok' if value <= limit else 'BAD'}", flush=True)

    for rows, columns in ((8192, 4096), (16384, 2048), (77, 5120), (33, 72), (5, 77)):
        x, dy, dx = bf16(rows, columns), bf16(rows, columns), bf16(rows, columns)
        weight, before = torch.randn(columns, device="cuda"), dx.clone()
        out, factor = torch.full_like(x, float("nan")), torch.full((rows, 1), float("nan"), device="cuda")
        forward = lambda x=x, weight=weight, out=out, factor=factor, rows=rows: kernel["rms_norm_bf16"](
            (rows,), (128,), matrix(x), pointer(weight), f32(1e-5), matrix(out), matrix(factor))
        backward = lambda x=x, dy=dy, weight=weight, factor=factor, dx=dx, rows=rows: kernel["rms_norm_backward_bf16"](
            (rows,), (128,), matrix(dy), matrix(x), pointer(weight), matrix(factor), matrix(dx))
        forward()
        backward()
        leaf = x.double().requires_grad_()
        want = leaf * (leaf.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
        (grad,) = torch.autograd.grad((want * dy.double()).sum(), leaf)
        held(f"rms norm {rows} x {columns}", error(out, want.detach()), 3e-3)
        held(f"rms norm backward {rows} x {columns}", error(dx, before.double() + grad), 3e-3)
        if rows > 1000:
            runs[f"rms norm {rows} x {columns}"], bytes_of[f"rms norm {rows} x {columns}"] = forward, 4 * x.numel()
            name = f"rms norm backward {rows} x {columns}"
            runs[name], bytes_of[name] = backward, 8 * x.numel()

    for rows, columns, rank in ((8192, 14336, 16), (8192, 4096, 16), (8192, 1024, 16), (16384, 8192, 16), (8192, 4096, 32),
                                (1000, 520, 8), (77, 72, 16), (4097, 6144, 32)):
        low_rank = LowRank(card, module, rank)
        wide = bf16(rows, columns + 8)
        dy, b, p = wide[:, :columns], bf16(columns, rank), bf16(rows, 3 * rank)[:, rank:2 * rank]
        dp, db = torch.full((rows, rank), float("nan"), device="cuda").bfloat16(), torch.randn(columns, rank, device="cuda")
        before = db.clone()
        low_rank(dy, b, p, 0.5, dp, db)
        held(f"low rank {rows} x {columns}, {rank}: dp", error(dp, 0.5 * dy.double() @ b.double()), 3e-3)
        held("  db", error(db, before.double() + 0.5 * dy.double().T @ p.double()), 1e-5)
        again = before.clone()
        low_rank(dy, b, p, 0.5, dp, again)
        held("  two runs", float((again != db).sum()), 0)
        if rows > 5000:
            name = f"low rank {rows} x {columns}, {rank}"
            runs[name] = lambda a=(dy, b, p, 0.5, dp, db), low_rank=low_rank: low_rank(*a)
            bytes_of[name] = 2 * dy.numel()
            q = p.contiguous()
            runs[name + ", cuBLAS"] = lambda dy=dy, b=b, q=q: (dy @ b, dy.T @ q)
            bytes_of[name + ", cuBLAS"] = 2 * dy.numel()

    merged = card.kernel(module, "nf4_merged", 2 * 128 * (16 + 2))
    plain = kernel["nf4_bf16"]
    for rows, columns in ((14336, 4096), (4096, 14336), (1024, 4096)):
        codes = torch.randint(0, 256, (rows * columns // 2,), device="cuda").byte()
        scales = torch.randint(0, 256, (rows * columns // 64,), device="cuda").byte()
        nested, table = torch.rand(rows * columns // 64 // 256 + 1, device="cuda"), torch.rand(256, device="cuda")
        argument = Nf4(codes.data_ptr(), scales.data_ptr(), nested.data_ptr(), table.data_ptr(), 0.1, 6, rows * columns)
        argument.keep = (codes, scales, nested, table)
        a, b = bf16(16, columns), bf16(rows, 16)
        base, both = (torch.full((rows, columns), float("nan"), device="cuda").bfloat16() for _ in range(2))
        name = f"NF4 {rows} x {columns}"
        runs[name] = lambda argument=argument, base=base: plain((132 * 32,), (256,), argument, pointer(base))
        runs[name + " with a branch"] = lambda n=argument, r=rows, c=columns, a=a, b=b, both=both: merged(
            (-(-c // 128), -(-r // 256)), (256,), n, u32(r), u32(c), pointer(a), pointer(b), u32(16), f32(0.5), pointer(both))
        runs[name]()
        runs[name + " with a branch"]()
        held(name + " with a branch", error(both, base.double() + 0.5 * b.double() @ a.double()), 4e-3)
        bytes_of[name] = bytes_of[name + " with a branch"] = rows * columns * (2 + 0.5 + 1 / 64)

    x, y = bf16(8192, 14336), bf16(8192, 14336)
    runs["copy, torch"], bytes_of["copy, torch"] = lambda: y.copy_(x), 4 * x.numel()
    runs["copy, ours"] = lambda: kernel["copy_bf16_bf16"]((8192, 7), (256,), matrix(x), matrix(y))
    bytes_of["copy, ours"] = 4 * x.numel()
    if not good:
        raise SystemExit("wrong results")
    for name, ms in compare(runs, 15).items():
        print(f"  {name:48} {1000 * ms:8.1f} us {bytes_of[name] / ms / 1e6:6.0f} GB/s", flush=True)


if __name__ == "__main__":
    main()
