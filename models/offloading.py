"""Activation offloading: the inputs of the fused layers in the CPU's memory, until their backward needs them."""

import weakref

import torch


class Offloaded:
    """A layer's input in page-locked memory of the CPU, copied there and back on a stream of its own.

    It is copied while the layer computes, and fetched while the layer behind it runs backward, so that the GPU does not
    wait. No block of memory is freed before the other stream is done with it, in the order of the GPU's work: with
    `record_stream` blocks would be free only when the GPU comes to that point, long after the CPU asks for more.
    `before`: what was offloaded before it; held weakly, since a forward that failed leaves one behind.
    """

    def __init__(self, h: torch.Tensor, stream: torch.cuda.Stream, before: "Offloaded | None"):
        self.stream, self.before = stream, None if before is None else weakref.ref(before)
        self.rows: torch.Tensor | None = h
        stream.wait_stream(torch.cuda.current_stream(h.device))
        with torch.cuda.stream(stream):
            self.host = torch.empty(h.shape, dtype=h.dtype, pin_memory=True).copy_(h, non_blocking=True)
            self.copied = stream.record_event()
        if before is not None:
            before.release()

    def release(self) -> None:
        """Free the GPU's copy, once it is in the CPU's memory."""
        torch.cuda.current_stream().wait_event(self.copied)
        self.rows = None

    def prefetch(self) -> None:
        """Start the copy back, if the GPU has none."""
        if self.rows is None:
            self.rows = torch.empty_like(self.host, device=self.stream.device)
            self.stream.wait_stream(torch.cuda.current_stream())  # which may still use that memory
            with torch.cuda.stream(self.stream):
                self.rows.copy_(self.host, non_blocking=True)
                self.copied = self.stream.record_event()

    def fetch(self) -> torch.Tensor:
        """The input, on the GPU; starts to fetch the one before."""
        self.prefetch()
        torch.cuda.current_stream().wait_event(self.copied)
        if self.before is not None and (before := self.before()) is not None:
            before.prefetch()
        return self.rows


class Offloader:
    """What the layers of a model offload, in order."""

    def __init__(self):
        self.stream: torch.cuda.Stream | None = None
        self.last = lambda: None

    def __call__(self, h: torch.Tensor) -> Offloaded:
        if self.stream is None:
            self.stream = torch.cuda.Stream(h.device)
        offloaded = Offloaded(h, self.stream, self.last())
        self.last = weakref.ref(offloaded)
        return offloaded
