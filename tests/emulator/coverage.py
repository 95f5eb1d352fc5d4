"""Which basic blocks of the kernels ran, over any number of machines."""

from dataclasses import dataclass, field

from tests.emulator.machine import Machine


@dataclass
class Coverage:
    """Executions per basic block, by kernel and the block's first PTX line."""

    blocks: dict[str, dict[int, int]] = field(default_factory=dict)
    sources: dict[tuple[str, int], str] = field(default_factory=dict)

    def add(self, machine: Machine) -> None:
        """Add what a machine's kernels have executed so far. Add each machine once."""
        for kernel, entry in machine.kernels().items():
            counts = self.blocks.setdefault(kernel, {})
            for block in entry["blocks"]:
                line = block["ptx_line"]
                counts[line] = counts.get(line, 0) + block["executed"]
                self.sources[(kernel, line)] = block["source"]

    def missed(self, kernel: str) -> list[str]:
        """Return the blocks that never ran, by PTX line and source."""
        return [
            f"ptx:{line} {self.sources[(kernel, line)]}".strip()
            for line, count in sorted(self.blocks.get(kernel, {}).items())
            if count == 0 and line > 0
        ]

    def share(self, kernel: str) -> float:
        """Return the share of blocks that ran, in 0..1."""
        counts = [count for line, count in self.blocks.get(kernel, {}).items() if line > 0]
        return sum(count > 0 for count in counts) / len(counts) if counts else 0.0

    def table(self) -> str:
        """Return one line per kernel."""
        return "\n".join(
            f"{kernel:40s} {100 * self.share(kernel):5.1f} % of {len(blocks):4d} blocks"
            for kernel, blocks in sorted(self.blocks.items())
        )
