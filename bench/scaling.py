"""Memory and communication per rank of large models, on paper: `python -m bench.scaling` prints docs/scaling.md.

Nothing here is measured. The assumptions stand below; change them and print again.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpfast import tables

GIB = 1 << 30
LINK = 50e9  # bytes per second that a GPU sends between nodes
RANK = 16  # of LoRA adapters, at all seven linear layers of a block
RANKS = (8, 64, 256, 1024)
# bytes per trained parameter and rank count: float32 weights, two moments, clipped sum
STATE_BYTES = 4 + 8 + 4


@dataclass(frozen=True)
class Model:
    """A Llama-like decoder: width, MLP width, layers, width of keys and values, vocabulary."""

    name: str
    d: int
    f: int
    layers: int
    kv: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """``(in, out)`` of a block's linear layers; those with one input are one entry, which keeps it once."""
        return [(self.d, self.d + 2 * self.kv), (self.d, self.d), (self.d, 2 * self.f), (self.f, self.d)]

    @property
    def parameters(self) -> int:
        return self.layers * sum(a * b for a, b in self.linears) + 2 * self.vocabulary * self.d

    @property
    def adapters(self) -> int:
        """Parameters of the adapters: query, key, value, out, gate, up, down."""
        sides = [self.d + self.d, 2 * (self.d + self.kv), self.d + self.d, 2 * (self.d + self.f), self.f + self.d]
        return self.layers * RANK * sum(sides)

    def kept_bytes(self, lora: bool) -> int:
        """bfloat16 activations and backprops that a token's ghost norms and clipped sums keep until the pass ends.

        Of an adapter ``B A x``: x and the backprop of ``A x`` for A, ``A x`` and the output's backprop for B. Inputs
        that several adapters share are kept once.
        """
        if not lora:
            return 2 * self.layers * sum(a + b for a, b in self.linears)
        outs = self.d + 2 * self.kv + self.d + 2 * self.f + self.d
        ins = 3 * self.d + self.f
        return 2 * self.layers * (ins + outs + 2 * 7 * RANK)

    def written_bytes(self, lora: bool) -> int:
        """float32 per-sample gradients of one sample, if they are written out instead."""
        return 4 * (self.adapters if lora else self.parameters)


MODELS = (
    Model("7 B", 4096, 11008, 32, 4096, 32000),
    Model("70 B", 8192, 28672, 80, 1024, 128256),
    Model("400 B", 16384, 53248, 126, 1024, 128256),
)


def rows(lora: bool) -> list[list[str]]:
    table = []
    for model in MODELS:
        trained = model.adapters if lora else model.parameters
        for ranks in RANKS:
            state = (STATE_BYTES * trained + (2 * model.parameters if lora else 0)) / ranks
            gather = 2 * 2 * model.parameters  # bfloat16 weights, for the forward and for the backward
            scatter = 4 * trained  # float32 clipped sums
            table.append(
                [
                    model.name,
                    str(ranks),
                    f"{state / GIB:.1f}",
                    f"{gather / GIB:.0f}",
                    f"{scatter / GIB:.2f}" if lora else f"{scatter / GIB:.0f}",
                    f"{scatter * (ranks - 1) / ranks / LINK:.2f}",
                    f"{trained / ranks / 1e6:.1f}",
                ]
            )
    return table


def main() -> None:
    header = ("model", "GPUs", "state, GiB", "gathered, GiB", "scattered, GiB", "scatter, s", "noise, M elements")
    for lora in (False, True):
        print(f"\n### {'LoRA rank 16' if lora else 'All parameters'}, per rank and physical batch\n")
        print(tables.markdown(header, rows(lora)))
    print("\n### Kept until the pass ends, per GPU\n")
    header = (
        "model",
        "parameters",
        "A and G, MiB a token",
        "of adapters, MiB a token",
        "one sample written out, GiB",
        "of adapters, GiB",
    )
    cells = [
        [
            model.name,
            f"{model.parameters / 1e9:.1f} B",
            f"{model.kept_bytes(False) / 2**20:.2f}",
            f"{model.kept_bytes(True) / 2**20:.2f}",
            f"{model.written_bytes(False) / GIB:.0f}",
            f"{model.written_bytes(True) / GIB:.2f}",
        ]
        for model in MODELS
    ]
    print(tables.markdown(header, cells))


if __name__ == "__main__":
    main()
