"""The RecIS seq2seq example in PyTorch, which `train_step.py` compares with ours; needs only PyTorch.

    python benchmarks/torch_peer.py [--compile] [--hidden 256] … < counts

A transcription of the published model: tables whose rows are gathered for the unique ids of a batch and
updated by a sparse-row AdamW; concatenated and projected features; a pre-LN causal transformer with
fused attention (in bfloat16 on a GPU it must be the flash kernel, or it is an error); softmax over
cosine similarities in the batch; fused AdamW for the dense part. For each number that it reads, it
takes that many steps and prints a line of JSON with the mean seconds per step and the last loss.

Shapes: B batch, L positions, N heads, H head width, E model width, U unique ids, D table width, R rows.
"""

import argparse
import contextlib
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ROWS = ("item_rows", "cate_rows", "behavior_rows", "time_rows")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The flags that `train_step.py` passes on."""
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--feed_forward", type=int, default=256)
    parser.add_argument("--emb_dim", type=int, default=128)
    for name, rows in zip(ROWS, (2_048_000, 2_048, 2_048, 2_048_000), strict=True):
        parser.add_argument(f"--{name}", type=int, default=rows)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


class SparseTable:
    """A table and its AdamW, which updates only the rows of the unique ids of a batch."""

    def __init__(self, rows: int, width: int, device: str):
        self.values_RD = torch.empty(rows, width, device=device).normal_(std=0.001)
        self.m_RD = torch.zeros_like(self.values_RD)
        self.v_RD = torch.zeros_like(self.values_RD)
        self.steps = 0

    def look_up(self, ids_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `[U, D]` of the batch's unique ids, as leaves of the graph, and the index of each id."""
        self.used_U, place_BL = torch.unique(ids_BL, return_inverse=True)
        self.rows_UD = self.values_RD[self.used_U].requires_grad_()
        return self.rows_UD, place_BL

    @torch.no_grad()
    def update(self, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01) -> None:
        """One step of `s2s_jax.training.step.optimizer.sparse_row_adamw`."""
        self.steps += 1
        grad_UD, used_U = self.rows_UD.grad, self.used_U
        m_UD = self.m_RD[used_U].lerp_(grad_UD, 1 - beta1)
        v_UD = self.v_RD[used_U].mul_(beta2).addcmul_(grad_UD, grad_UD, value=1 - beta2)
        rate = lr * (1 - beta2**self.steps) ** 0.5 / (1 - beta1**self.steps)
        values_UD = self.rows_UD.detach() * (1 - lr * weight_decay)
        values_UD.addcdiv_(m_UD, v_UD.sqrt().add_(eps), value=-rate)
        self.values_RD.index_copy_(0, used_U, values_UD)
        self.m_RD.index_copy_(0, used_U, m_UD)
        self.v_RD.index_copy_(0, used_U, v_UD)


class Layer(nn.Module):
    """A pre-LN transformer layer."""

    def __init__(self, width: int, heads: int, feed_forward: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, feed_forward), nn.Linear(feed_forward, width)
        self.heads = heads

    def forward(self, x_BLE: torch.Tensor) -> torch.Tensor:
        """Attention and feed-forward, each with a residual connection."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x_BLE)).chunk(3, dim=-1)
        )
        out_BNLH = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BLE = x_BLE + self.proj(out_BNLH.transpose(1, 2).flatten(2))
        return x_BLE + self.down(F.gelu(self.up(self.norm2(x_BLE))))


class Model(nn.Module):
    """From the gathered rows of all features to the mean loss."""

    def __init__(self, sizes: argparse.Namespace):
        super().__init__()
        self.proj = nn.Linear(len(ROWS) * sizes.emb_dim, sizes.hidden)
        self.layers = nn.ModuleList(
            Layer(sizes.hidden, sizes.heads, sizes.feed_forward) for _ in range(sizes.layers)
        )
        self.final_norm = nn.LayerNorm(sizes.hidden)
        self.temperature = sizes.temperature

    def forward(
        self, rows: list[torch.Tensor], places: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss and the hit rate."""
        found = [F.embedding(place, table) for table, place in zip(rows, places, strict=True)]
        events_BLE = self.proj(torch.cat(found, dim=-1))
        x_BLE = events_BLE
        for layer in self.layers:
            x_BLE = layer(x_BLE)
        queries_NE = F.normalize(self.final_norm(x_BLE)[:, :-1].flatten(0, 1), dim=-1, eps=1e-6)
        items_NE = F.normalize(events_BLE[:, 1:].flatten(0, 1), dim=-1, eps=1e-6)
        logits_NN = queries_NE @ items_NE.T / self.temperature
        labels_N = torch.arange(len(logits_NN), device=logits_NN.device)
        hits = (logits_NN.detach().argmax(dim=-1) == labels_N).float().mean()
        return F.cross_entropy(logits_NN, labels_N), hits


def serve(sizes: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if device == "cuda":
        # The same as XLA's default; only matters for float32.
        torch.set_float32_matmul_precision("high")
    rows = [getattr(sizes, name) for name in ROWS]
    tables = [SparseTable(count, sizes.emb_dim, device) for count in rows]
    model = Model(sizes).to(device)
    forward = torch.compile(model) if sizes.compile else model
    dense = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    narrow = sizes.dtype == "bfloat16"
    attention = contextlib.nullcontext
    if narrow and device == "cuda":

        def attention():
            return sdpa_kernel(SDPBackend.FLASH_ATTENTION)

    def step() -> torch.Tensor:
        shape = (sizes.batch, sizes.seq_len)
        batch = [torch.randint(count, shape, device=device) for count in rows]
        found = [table.look_up(ids_BL) for table, ids_BL in zip(tables, batch, strict=True)]
        with torch.autocast(device, torch.bfloat16, enabled=narrow), attention():
            loss, _ = forward([f[0] for f in found], [f[1] for f in found])
        dense.zero_grad(set_to_none=True)
        loss.backward()
        dense.step()
        for table in tables:
            table.update()
        return loss.detach()

    for line in sys.stdin:
        steps, loss, begin = int(line), torch.zeros(()), time.perf_counter()
        for _ in range(steps):
            loss = step()
        if device == "cuda":
            torch.cuda.synchronize()
        answer = {"seconds": (time.perf_counter() - begin) / steps, "loss": float(loss)}
        if device == "cuda":
            answer["peak_bytes"] = torch.cuda.max_memory_allocated()
        print(json.dumps(answer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_sizes(parser)
    parser.add_argument("--compile", action="store_true")
    serve(parser.parse_args())


if __name__ == "__main__":
    main()
