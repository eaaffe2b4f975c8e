"""Looks at images in a child process, where an image that was made to do harm costs its row, and nothing else.

A decoder that takes too long, takes too much memory or crashes ends the child alone; the next image gets a new one. Time is
counted in CPU seconds, so that a busy machine refuses no image that an idle one takes. Sending an image to the child costs far
less than decoding it.
"""

import fcntl
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, BinaryIO

from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.workers.images import ImageLimits, open_image, perceptual_hash, to_rgb, too_many_bytes

LENGTH = struct.Struct("<Q")
READY = {"ready": True}
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "TMPDIR")
"""Variables that the child gets: it handles what strangers made, and needs no credentials."""
SETTINGS = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**27)}
"""Of glibc: memory of one image is kept for the next; else half of the time goes into asking the system for it."""
CODE = "from pipelines.ingest.decoder import serve; serve()"
PATIENCE = 20  # wall-clock time for each CPU second that is allowed, on a busy machine
START_SECONDS = 300.0
LEFTOVERS = 8  # a child that keeps this part of the memory that it may take, after an image, is replaced
PIPE_BYTES = 2**20  # as much as Linux allows to everybody
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}


class Decoder:
    """The child process, which is started with the first image."""

    def __init__(self, limits: ImageLimits):
        self.limits = limits
        self.child: subprocess.Popen[bytes] | None = None
        self.received = b""  # what it sent, without the lines that were taken

    def describe(self, images: Sequence[bytes]) -> Iterator[Row | RowRefused]:
        """For each image, in order: `format`, `width`, `height` and `phash`, or why it is refused.

        Reasons: those of `images.decode`; too_slow; and corrupt also for an image that crashes its decoder.

        Raises RuntimeError: the child does not start, or twice something else killed it at the same image.
        """
        answers = self._describe([image for image in images if len(image) <= self.limits.max_bytes])
        for image in images:
            is_too_long = len(image) > self.limits.max_bytes
            yield too_many_bytes(len(image), self.limits.max_bytes) if is_too_long else next(answers)

    def _describe(self, images: Sequence[bytes]) -> Iterator[Row | RowRefused]:
        position, is_second = 0, False
        try:
            while position < len(images):
                for answer in self._ask(images[position:]):
                    if "again" in answer and is_second:
                        raise RuntimeError(answer["again"])
                    is_second = "again" in answer
                    if not is_second:
                        position += 1
                        yield RowRefused(answer["reason"], answer["detail"]) if "reason" in answer else answer
        finally:
            if position < len(images):  # the child would answer for images that nobody asks for any more
                self.close()

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            for pipe in (self.child.stdin, self.child.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()
            self.child = None

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def _ask(self, images: Sequence[bytes]) -> Iterator[Row]:
        """Yield the child's answers, until it ends. "again" in the last says that this image has to be asked for once more.

        A thread sends the images, so that the child need not wait for this process, nor this process for each image.
        """
        child = self._start() if self.child is None else self.child
        sender = threading.Thread(target=_send_images, args=(child.stdin, images), daemon=True)
        sender.start()
        for _ in images:
            answer = self._receive(child, self.limits.decode_seconds * PATIENCE)
            if answer is None:
                answer = self._explain_end(child)
            elif answer.pop("is_full", False):
                self.close()
            yield answer
            if self.child is not child:
                break
        sender.join()

    def _start(self) -> "subprocess.Popen[bytes]":
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        environment |= SETTINGS | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", CODE, json.dumps(asdict(self.limits))]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.received = b""
        assert self.child.stdin is not None
        with suppress(OSError):  # so that a few images lie ready
            fcntl.fcntl(self.child.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        if self._receive(self.child, START_SECONDS) != READY:
            code = _exit_code(self.child)
            self.close()
            raise RuntimeError(f"the process that decodes images does not start (exit code {code})")
        return self.child

    def _receive(self, child: "subprocess.Popen[bytes]", seconds: float) -> Row | None:
        """One answer; None if the child ends before it, or takes longer."""
        assert child.stdout is not None
        poll = select.poll()
        poll.register(child.stdout, select.POLLIN)
        while b"\n" not in self.received:
            if not poll.poll(1000 * seconds):
                return None
            received = os.read(child.stdout.fileno(), 2**16)
            if not received:
                return None
            self.received += received
        line, _, self.received = self.received.partition(b"\n")
        answer: Row = json.loads(line)
        return answer

    def _explain_end(self, child: "subprocess.Popen[bytes]") -> Row:
        code = _exit_code(child)
        self.close()
        if code is None or code == -signal.SIGXCPU:  # None: it hangs without using the CPU
            return {"reason": "too_slow", "detail": f"decoding takes over decode_seconds={self.limits.decode_seconds:g}"}
        if -code in CRASHES:
            return {"reason": "corrupt", "detail": f"its decoder crashes ({signal.Signals(-code).name})"}
        return {"again": f"the process that decodes images ended with code {code}: did it run out of memory?"}


def _exit_code(child: "subprocess.Popen[bytes]") -> int | None:
    """Of a process that has closed its pipes; None if it has not, and runs on."""
    with suppress(subprocess.TimeoutExpired):
        return child.wait(timeout=2)
    return None


def _send_images(pipe: BinaryIO, images: Sequence[bytes]) -> None:
    with suppress(BrokenPipeError, ValueError):  # the child has ended, and the pipe may be closed
        for image_bytes in images:
            pipe.write(LENGTH.pack(len(image_bytes)))
            pipe.write(image_bytes)
            pipe.flush()


def serve() -> None:
    """The child: answer for each image on the standard input by a line of JSON, until the input ends."""
    limits = ImageLimits(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    warnings.simplefilter("ignore")
    _limit(resource.RLIMIT_CORE, 0)
    begun = _address_space()
    _limit(resource.RLIMIT_AS, begun + limits.decode_bytes)
    _send(answers, READY)
    while header := sys.stdin.buffer.read(LENGTH.size):
        image_bytes = sys.stdin.buffer.read(LENGTH.unpack(header)[0])
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + limits.decode_seconds) + 1)
        answer = _describe(image_bytes, limits)
        if _address_space() - begun > limits.decode_bytes // LEFTOVERS:
            answer["is_full"] = True
        _send(answers, answer)


def _describe(image_bytes: bytes, limits: ImageLimits) -> Row:
    """`describe` of `Decoder`, for one image, with a refusal as "reason" and "detail"."""
    try:
        opened = open_image(image_bytes, limits)
        image = to_rgb(opened)
        phash = perceptual_hash(image)
        return {"format": opened.format, "width": image.width, "height": image.height, "phash": phash}
    except RowRefused as refused:
        is_out = isinstance(refused.__cause__, MemoryError)
        return {"reason": refused.reason, "detail": _out_of_memory(limits) if is_out else refused.detail}
    except MemoryError:
        return {"reason": "too_large", "detail": _out_of_memory(limits)}


def _out_of_memory(limits: ImageLimits) -> str:
    return f"decoding takes more memory than decode_bytes={limits.decode_bytes}"


def _send(answers: BinaryIO | Any, answer: Row) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")


def _limit(kind: int, value: int) -> None:
    with suppress(ValueError, OSError):  # not every system has each of them
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
