"""Which input shapes an engine is built for, when the program leaves axes free: (min, opt, max) for every input.

Axis 0 is the batch. Any other free axis ends at the length of the calibration data, because nothing says that the model
works beyond it (learned positions have a last one); it begins at 1, or where it cannot be that short, is that length.
"""

from collections.abc import Mapping

from exporter.backends.tensorrt.build import Profile
from passes.base import Program
from passes.calibration import Batch, run_graph
from passes.graph import inputs_of

BATCHES = (1, 8, 32)
Range = tuple[int, int, int]


def choose_profiles(program: Program) -> dict[str, Profile]:
    """{input: (min, opt, max) shape} of the inputs that have a free axis; axes of one label get one range."""
    example = program.calibration.batches[0]
    names = [str(node.target) for node in inputs_of(program.graph)]
    ranges: dict[str, Range] = {}
    for name in names:
        for axis, label in sorted(program.dynamic.get(name, {}).items()):
            size = example[name].shape[axis]
            if axis == 0:
                ranges[label] = (BATCHES[0], BATCHES[1], max(BATCHES[2], size))
            elif label not in ranges:
                ranges[label] = (1 if _runs_at_length_one(program, label, example) else size, size, size)
    profiles: dict[str, Profile] = {}
    for name in names:
        free = program.dynamic.get(name, {})
        if not free:
            continue
        shape = example[name].shape
        low, opt, high = (
            tuple(ranges[free[axis]][bound] if axis in free else size for axis, size in enumerate(shape))
            for bound in range(3)
        )
        profiles[name] = (low, opt, high)
    return profiles


def largest_axes(dynamic: Mapping[str, Mapping[int, str]], profiles: Mapping[str, Profile]) -> dict[str, int]:
    """{label: the largest size that the profiles have for it} of the inputs' free axes."""
    largest: dict[str, int] = {}
    for name, axes in dynamic.items():
        high = profiles[name][2] if name in profiles else ()
        for axis, label in axes.items():
            if axis < len(high):
                largest[label] = max(high[axis], largest.get(label, 0))
    return largest


def _runs_at_length_one(program: Program, label: str, example: Batch) -> bool:
    """Try it: the data cut to one element along every axis of that label."""
    cut = dict(example)
    for name, axes in program.dynamic.items():
        for axis in (axis for axis, other in axes.items() if other == label):
            cut[name] = cut[name].narrow(axis, 0, 1)
    try:
        run_graph(program.graph, [cut])
    except (RuntimeError, ValueError, IndexError):  # how operators refuse a shape
        return False
    return True
