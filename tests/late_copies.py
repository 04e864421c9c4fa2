"""Copies between a device and its host that are made as late as a GPU could make them, for tests of offloading."""

from weakref import ref

import torch


class LateCopies:
    """Every copy is made only when something waits for it, in the order of its stream.

    A copy that nobody has waited for leaves NaN behind, and one whose tensor on the device is gone by then fails.

    Attributes:
        sizes: bytes of the host memory that was given.
        sent: the tensors that were copied out: bytes and address of each.
        log: what happened, in order, with the first element of each first tensor: ("out", 3.0), ("back", 3.0), and
            ("made", 3.0) when a copy is made.
    """

    def __init__(self):
        self.sizes, self.sent, self.log = [], [], []
        self._streams = {"out": [], "back": []}
        self._done = {"out": 0, "back": 0}

    def allocate(self, size):
        self.sizes.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)  # NaN of every floating type

    def reached(self):
        return "current", 0  # all that a CPU was told is done

    def out(self, sources, hosts, after):
        assert ("current", 0) in after, "the tensors must have been computed"
        self.sent += [(source.nbytes, source.data_ptr()) for source in sources]
        self.log.append(("out", sources[0].flatten()[0].item()))
        return self._give(
            "out", [(ref(source), host, True) for source, host in zip(sources, hosts, strict=True)], after
        )

    def back(self, hosts, after):
        tensors = [torch.full_like(host, float("nan")) for host in hosts]
        self._wait_for(after)  # so that the log can name it
        self.log.append(("back", hosts[0].flatten()[0].item()))
        return tensors, self._give("back", [(ref(t), h, False) for t, h in zip(tensors, hosts, strict=True)], [])

    def wait(self, mark):
        self._wait_for([mark])

    def _give(self, stream, copies, after):
        self._streams[stream].append((copies, after))
        return stream, len(self._streams[stream])

    def _wait_for(self, marks):
        for stream, count in (mark for mark in marks if mark not in (None, ("current", 0))):
            while self._done[stream] < count:
                copies, after = self._streams[stream][self._done[stream]]
                self._wait_for(after)
                for device, host, is_out in copies:
                    tensor = device()
                    assert tensor is not None, "a tensor was dropped while it was copied"
                    host.copy_(tensor) if is_out else tensor.copy_(host)
                self.log.append(("made", copies[0][1].flatten()[0].item()))
                self._streams[stream][self._done[stream]] = None
                self._done[stream] += 1
