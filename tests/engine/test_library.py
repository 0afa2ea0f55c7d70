# SPDX-License-Identifier: Apache-2.0
"""AdapterLibrary: names, the files behind them, and images that come and go in the host store."""

import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.dlpack import from_dlpack

import toppings
from toppings import Adapter, AdapterLibrary, HostStore
from toppings._runtime import ModelShape
from toppings.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    CancelledError,
    InvalidArgumentError,
    StoreFullError,
    UnknownAdapterError,
)
from toppings.library import pack

from .models import World, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET = 1 << 30


def library_of(budget: int = BUDGET, **options) -> tuple[AdapterLibrary, HostStore]:
    attached = toppings.attach(make_model("llama"))
    store = HostStore(budget)
    return (
        AdapterLibrary(store, attached.shape, attached.modules, torch.float32, **options),
        store,
    )


def memory_adapter(value: float, rank: int = 2, path: str = "self_attn.q_proj", **sizes) -> Adapter:
    k, n = sizes.get("k", 48), sizes.get("n", 64)
    a, b = torch.full((rank, k), value), torch.full((n, rank), 1.0)
    return Adapter.from_tensors({f"model.layers.0.{path}": (a, b, 1.0)})


def data_of(image) -> list[torch.Tensor]:
    return [from_dlpack(image.layer_data(layer)).clone() for layer in range(3)]


def size_of(adapter: Adapter) -> int:
    return library_of()[0].add("x", adapter).bytes


def test_names_lead_to_images(llama: World) -> None:
    library, store = library_of()
    assert library.names() == [] and "odd" not in library
    image = library.add("odd", llama.path("odd"))
    library.add("made", memory_adapter(1.0))
    assert library.names() == ["odd", "made"] and "odd" in library
    found = library.image("odd")
    assert found.digest == image.digest == toppings.read_adapter(llama.path("odd")).digest
    assert found.layout.max_rank == 3
    library.remove("odd")
    assert library.names() == ["made"] and store.find(image.digest) is None
    for call in (library.image, library.remove):
        with pytest.raises(UnknownAdapterError, match=r"\(made\), got 'odd'"):
            call("odd")
    # Whoever holds an image keeps it.
    assert any(bool(block.any()) for block in data_of(image))


def test_an_image_holds_the_adapters_numbers(llama: World) -> None:
    library, _ = library_of()
    image = library.add("odd", llama.path("odd"))
    adapter = toppings.read_adapter(llama.path("odd"))
    attached = toppings.attach(make_model("llama"))
    for path, module in adapter.modules.items():
        layer, projection = attached.modules[path]
        assert image.scale(layer, projection) == pytest.approx(module.scale)
        block = data_of(image)[layer]
        numbers = set(block.tolist())
        assert set(module.a.flatten().tolist()) | set(module.b.flatten().tolist()) <= numbers


def test_names_must_be_names() -> None:
    library, _ = library_of()
    for name in ("", None, 3, b"x"):
        with pytest.raises(InvalidArgumentError, match="adapter name"):
            library.add(name, memory_adapter(1.0))  # type: ignore[arg-type]
    assert library.names() == []


def test_evicted_images_are_read_again(llama: World) -> None:
    size = library_of()[0].add("odd", llama.path("odd")).bytes
    patterns = library_of()[0].add("patterns", llama.path("patterns")).bytes
    library, store = library_of(max(size, patterns) + min(size, patterns) // 2)
    expected = data_of(library.add("odd", llama.path("odd")))
    digest = library.image("odd").digest
    library.add("patterns", llama.path("patterns"))
    assert store.stats().evictions == 1 and store.find(digest) is None
    assert library.names() == ["odd", "patterns"]
    again = library.image("odd")
    assert store.stats().evictions == 2
    assert all(torch.equal(x, y) for x, y in zip(data_of(again), expected, strict=True))


def test_adapters_without_files_are_never_evicted(llama: World) -> None:
    made = memory_adapter(1.0)
    files = library_of()[0].add("odd", llama.path("odd")).bytes
    library, store = library_of(files + size_of(made) - 1)
    library.add("made", made)
    with pytest.raises(StoreFullError):
        library.add("odd", llama.path("odd"))
    assert library.names() == ["made"] and store.stats().images == 1
    library.remove("made")
    library.add("odd", llama.path("odd"))


def test_images_in_use_fill_the_store() -> None:
    first, second = memory_adapter(1.0), memory_adapter(2.0)
    library, store = library_of(size_of(first) * 3 // 2)
    held = library.add("first", first)
    library.remove("first")
    with pytest.raises(StoreFullError):
        library.add("second", second)
    assert library.names() == []
    del held
    library.add("second", second)
    assert store.stats().images == 1


def test_an_adapter_beyond_the_whole_budget(llama: World) -> None:
    library, store = library_of(1000)
    with pytest.raises(InvalidArgumentError, match="budget"):
        library.add("odd", llama.path("odd"))
    assert library.names() == [] and store.stats().used_bytes == 0


def test_changed_files_are_detected(llama: World, tmp_path: Path) -> None:
    library, store = library_of()
    folder = tmp_path / "adapter"
    shutil.copytree(llama.path("odd"), folder)
    digest = library.add("x", folder).digest
    shutil.rmtree(folder)
    shutil.copytree(llama.path("rslora"), folder)
    assert library.image("x").digest == digest  # in the store still
    assert store.erase(digest)
    with pytest.raises(AdapterFormatError, match="'x': expected the files it was added with"):
        library.image("x")
    shutil.rmtree(folder)
    with pytest.raises(AdapterFormatError):
        library.image("x")
    assert library.names() == ["x"]
    shutil.copytree(llama.path("odd"), folder)
    assert library.image("x").digest == digest


def test_replacement(llama: World) -> None:
    library, store = library_of()
    old = library.add("x", llama.path("odd"))
    new = library.add("x", llama.path("rslora"))
    assert library.names() == ["x"] and library.image("x").digest == new.digest
    assert store.find(old.digest) is None
    again = library.add("x", llama.path("rslora"))
    assert store.find(again.digest) is not None and store.stats().images == 1


def test_two_names_of_one_digest(llama: World) -> None:
    library, store = library_of()
    first, second = library.add("a", llama.path("odd")), library.add("b", llama.path("odd"))
    assert first.digest == second.digest and store.stats().images == 1
    library.remove("a")
    assert store.find(first.digest) is not None
    library.add("a", llama.path("rslora"))
    library.add("b", llama.path("rslora"))
    assert store.find(first.digest) is None and store.stats().images == 1
    library.remove("b")
    assert library.image("a").layout.max_rank == 16


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        (memory_adapter(1.0, k=47), r"expected A \[r, 48\] and B \[64, r\].* got A \[2, 47\]"),
        (memory_adapter(1.0, n=65), r"got A \[2, 48\] and B \[65, 2\]"),
        (memory_adapter(1.0, path="self_attn.x_proj"), "got a module it lacks"),
        (memory_adapter(1.0, path="self_attn"), "got a module it lacks"),
        (memory_adapter(1.0, rank=17), "rank of at most 16, got 17"),
    ],
)
def test_adapters_that_do_not_fit_change_nothing(llama: World, adapter: Adapter, text: str) -> None:
    library, store = library_of(max_rank=16)
    before = library.add("x", llama.path("rslora")).digest, store.stats()
    with pytest.raises(AdapterMismatchError, match=text):
        library.add("x", adapter)
    with pytest.raises(AdapterMismatchError, match=text):
        library.add("y", adapter)
    assert (library.image("x").digest, store.stats()) == before
    assert library.names() == ["x"]


def test_damaged_files_change_nothing(llama: World, tmp_path: Path) -> None:
    library, store = library_of()
    before = library.add("x", llama.path("odd")).digest, store.stats()
    with pytest.raises(AdapterFormatError):
        library.add("x", tmp_path)
    assert (library.image("x").digest, store.stats()) == before


def test_prepared_adapters_have_no_name_before_commit() -> None:
    library, store = library_of()
    prepared = library.prepare("x", memory_adapter(1.0))
    assert library.names() == [] and store.stats().images == 1
    library.commit("x", prepared)
    assert library.image("x").digest == prepared.digest


def test_weights_are_cast_to_the_librarys_dtype() -> None:
    shape = ModelShape([[("p", 4, 4)]])
    library = AdapterLibrary(HostStore(BUDGET), shape, {"p": (0, 0)}, torch.bfloat16)
    a = torch.full((1, 4), 1.0 + 2.0**-12)
    image = library.add("x", Adapter.from_tensors({"p": (a, torch.ones(4, 1), 0.5)}))
    block = from_dlpack(image.layer_data(0))
    assert block.dtype == torch.bfloat16 and set(block.tolist()) <= {0.0, 1.0}
    assert image.scale(0, 0) == 0.5


@pytest.fixture
def packed(llama: World, tmp_path: Path) -> Path:
    attached = toppings.attach(make_model("llama"))
    path = tmp_path / "odd.toppings"
    adapter = toppings.read_adapter(llama.path("odd"))
    image = pack(adapter, attached.shape, attached.modules, torch.float32, path)
    assert image.digest == adapter.digest
    return path


def test_a_packed_file_is_the_same_adapter(llama: World, packed: Path) -> None:
    library, store = library_of()
    image = library.add("packed", packed)
    assert image.digest == toppings.read_adapter(llama.path("odd")).digest
    assert library.add("folder", llama.path("odd")) is image and store.stats().images == 1
    expected = data_of(library_of()[0].add("odd", llama.path("odd")))
    assert all(torch.equal(x, y) for x, y in zip(data_of(image), expected, strict=True))
    del image
    library.remove("folder")
    digest = library.image("packed").digest
    assert store.erase(digest)
    again = library.image("packed")
    assert again.digest == digest and store.find(digest) is again
    assert all(torch.equal(x, y) for x, y in zip(data_of(again), expected, strict=True))


def test_packed_files_that_do_not_fit_change_nothing(
    llama: World, packed: Path, tmp_path: Path
) -> None:
    shape, modules = ModelShape([[("p", 4, 4)]]), {"p": (0, 0)}
    other = tmp_path / "other.toppings"
    ones = torch.ones(1, 4), torch.ones(4, 1), 1.0
    pack(Adapter.from_tensors({"p": ones}), shape, modules, torch.float32, other)
    half = tmp_path / "half.toppings"
    attached = toppings.attach(make_model("llama"))
    adapter = toppings.read_adapter(llama.path("odd"))
    pack(adapter, attached.shape, attached.modules, torch.float16, half)
    damaged = tmp_path / "damaged.toppings"
    damaged.write_bytes(packed.read_bytes()[:-1])
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"{}")
    library, store = library_of(max_rank=3)
    for path, error, text in [
        (other, AdapterMismatchError, "another"),
        (half, AdapterMismatchError, "packed as float32, got float16"),
        (damaged, AdapterFormatError, "as its header says"),
        (foreign, AdapterFormatError, "a packed image, got other bytes"),
    ]:
        with pytest.raises(error, match=text):
            library.add("x", path)
    with pytest.raises(AdapterMismatchError, match="rank of at most 2, got 3"):
        library_of(max_rank=2)[0].add("x", packed)
    assert library.names() == [] and store.stats().used_bytes == 0
    assert library.add("x", packed).layout.max_rank == 3


def test_one_store_serves_one_dtype(llama: World) -> None:
    library, store = library_of()
    attached = toppings.attach(make_model("llama"))
    held = library.add("x", llama.path("odd"))
    halves = AdapterLibrary(store, attached.shape, attached.modules, torch.float16)
    with pytest.raises(
        InvalidArgumentError, match="expected images of float16, got one of float32"
    ):
        halves.add("x", llama.path("odd"))
    assert halves.names() == [] and library.image("x") is held


def files_of(kind: str, llama: World, packed: Path, tmp_path: Path) -> Path:
    """The adapter "odd" as a folder or as a file, of which the test may dispose."""
    if kind == "packed":
        return packed
    folder = tmp_path / "folder"
    shutil.copytree(llama.path("odd"), folder)
    return folder


def wait_until_idle(store: HostStore, used_bytes: int) -> None:
    """The thread that settles a future holds the image a moment longer."""
    deadline = time.monotonic() + 60
    while store.stats().used_bytes != used_bytes and time.monotonic() < deadline:
        time.sleep(0.001)
    assert store.stats().used_bytes == used_bytes


class Blocked:
    """A library whose store has no room until release()."""

    def __init__(self, path: Path, **options) -> None:
        size = library_of()[0].add("x", path).bytes
        self.library, self.store = library_of(size, **options)
        self.digest = self.library.add("x", path).digest
        self.store.erase(self.digest)
        self._held = self.library.prepare("blocker", memory_adapter(1.0))

    def release(self) -> None:
        del self._held


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_fetch_reads_in_the_background(
    llama: World, packed: Path, tmp_path: Path, kind: str
) -> None:
    blocked = Blocked(files_of(kind, llama, packed, tmp_path))
    library, store = blocked.library, blocked.store
    first = library.fetch("x", patience_seconds=60)
    second = library.fetch("x", patience_seconds=60)
    assert first is second and not first.cancel()
    with pytest.raises(TimeoutError):
        first.result(0.05)
    with pytest.raises(StoreFullError):  # the patience is each call's own
        library.image("x")
    blocked.release()
    image = first.result(60)
    assert image.digest == blocked.digest
    del first, second
    present = library.fetch("x")
    assert present.done() and present.result() is image
    assert store.stats().images == 1


def test_fetching_what_was_never_added(llama: World) -> None:
    library, _ = library_of()
    with pytest.raises(UnknownAdapterError):
        library.fetch("x")
    library.add("made", memory_adapter(1.0))
    assert library.fetch("made").done()


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_a_fetch_outlives_the_name(llama: World, packed: Path, tmp_path: Path, kind: str) -> None:
    blocked = Blocked(files_of(kind, llama, packed, tmp_path))
    library, store = blocked.library, blocked.store
    future = library.fetch("x", patience_seconds=60)
    replacement = memory_adapter(2.0)
    library.commit("x", library.prepare("x", memory_adapter(1.0)))  # in the store already
    assert library.fetch("x").result().digest != blocked.digest
    library.remove("x")
    blocked.release()
    old = future.result(60)
    assert old.digest == blocked.digest
    assert store.find(blocked.digest) is None  # no name leads to it
    del old, future
    wait_until_idle(store, 0)
    assert library.add("x", replacement).digest == replacement.digest
    assert store.stats().images == 1 and store.stats().used_bytes == size_of(replacement)


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_failures_come_from_the_future(
    llama: World, packed: Path, tmp_path: Path, kind: str
) -> None:
    path = files_of(kind, llama, packed, tmp_path)
    library, store = library_of()
    digest = library.add("x", path).digest
    assert store.erase(digest)
    backup = tmp_path / "backup"
    path.rename(backup)
    with pytest.raises(
        AdapterFormatError, match="a PEFT folder or a packed file, got No such file"
    ):
        library.fetch("x").result(60)
    shutil.copytree(llama.path("rslora"), path)
    with pytest.raises(AdapterFormatError, match="'x': expected the files it was added with"):
        library.fetch("x").result(60)
    wait_until_idle(store, 0)
    assert store.stats().images == 0
    shutil.rmtree(path)
    backup.rename(path)
    assert library.fetch("x").result(60).digest == digest


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_closing_ends_the_reads(llama: World, packed: Path, tmp_path: Path, kind: str) -> None:
    blocked = Blocked(files_of(kind, llama, packed, tmp_path), parallel_reads=1)
    library = blocked.library
    reads = [library.fetch("x", patience_seconds=seconds) for seconds in (3600, 3601, 3602)]
    start = time.monotonic()
    library.close()
    assert time.monotonic() - start < 30
    for read in reads:
        assert read.done()
        with pytest.raises(CancelledError):
            read.result()
    library.close()
    with pytest.raises(CancelledError, match="got a closed one"):
        library.fetch("x")
    assert blocked.store.stats().images == 1  # the blocker
    library.add("made", memory_adapter(1.0))
    assert library.image("made").digest == memory_adapter(1.0).digest


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_closing_refuses_files(llama: World, packed: Path, tmp_path: Path, kind: str) -> None:
    library, store = library_of()
    library.close()
    with pytest.raises(CancelledError, match="got a closed one"):
        library.add("x", files_of(kind, llama, packed, tmp_path))
    assert library.names() == [] and store.stats().images == 0


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_a_read_ends_when_nobody_waits_for_it_any_more(
    llama: World, packed: Path, tmp_path: Path, kind: str
) -> None:
    blocked = Blocked(files_of(kind, llama, packed, tmp_path), parallel_reads=1)
    library = blocked.library
    read = library.fetch("x", patience_seconds=3600)
    assert library.fetch("x", patience_seconds=3600) is read
    queued = library.fetch("x", patience_seconds=3601)
    library.give_up(queued)
    library.give_up(queued)  # not twice
    library.give_up(read)
    with pytest.raises(TimeoutError):
        read.result(0.5)  # the second caller waits still
    library.give_up(read)
    again = library.fetch("x", patience_seconds=3600)
    assert again is not read
    for ended in (read, queued):
        with pytest.raises(CancelledError):
            ended.result(30)
    blocked.release()
    assert again.result(60).digest == blocked.digest
    library.give_up(again)
    assert library.image("x").digest == blocked.digest


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_the_interpreter_does_not_wait_for_reads(
    llama: World, packed: Path, tmp_path: Path, kind: str
) -> None:
    script = (
        "import sys; from pathlib import Path; from engine.test_library import Blocked;"
        " blocked = Blocked(Path(sys.argv[1]));"
        " read = blocked.library.fetch('x', patience_seconds=3600);"
        " print(read.running())"
    )
    path = files_of(kind, llama, packed, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_discarded_adapters_leave_the_store_unless_they_have_a_name() -> None:
    library, store = library_of()
    library.discard(library.prepare("x", memory_adapter(1.0)))
    assert store.stats().images == 0
    library.add("x", memory_adapter(1.0))
    library.discard(library.prepare("y", memory_adapter(1.0)))
    assert library.names() == ["x"] and store.stats().images == 1


def test_parallel_reads_must_be_positive() -> None:
    with pytest.raises(InvalidArgumentError, match="parallel_reads: expected at least 1, got 0"):
        library_of(parallel_reads=0)


def test_many_fetches_of_many_adapters(llama: World, packed: Path) -> None:
    """Threads fetch by turns what a store with room for two of four adapters has to read again."""
    paths = {name: llama.path(name) for name in ("odd", "attention", "layers")}
    paths["packed"] = packed
    sizes = [library_of()[0].add("x", path).bytes for path in paths.values()]
    library, store = library_of(2 * max(sizes))
    digests = {name: library.add(name, path).digest for name, path in paths.items()}

    def work(seed: int) -> int:
        chooser = random.Random(seed)
        for _ in range(40):
            name = chooser.choice(list(digests))
            assert library.fetch(name, patience_seconds=60).result(60).digest == digests[name]
        return 40

    with ThreadPoolExecutor(3) as pool:
        assert sum(pool.map(work, range(3))) == 120
    library.close()
    assert store.stats().evictions > 0
    assert store.stats().used_bytes <= 2 * max(sizes)
