"""What does not fit is refused in words before it is tried; limits that a run sets are given back."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from method_runs import run_of, settings_for
from mlx_nb import Run, RunConfig
from mlx_nb.data.examples.batches import TokenBatch, pad
from mlx_nb.errors import OutOfMemory
from mlx_nb.events import RunFailed
from mlx_nb.model import backend, batch_memory, loading, memory
from mlx_nb.model.batch_memory import ModelSizes, least_bytes
from mlx_nb.model.logprobs import TargetScorer, target_inputs
from mlx_nb.model.trained import trainable_count
from mlx_nb.train.tripwires import out_of_memory
from tiny import VOCABULARY, random_examples, tiny_model

COMMAND_BUFFER = "[METAL] Command buffer execution failed"
OUT_OF_MEMORY = [
    f"{COMMAND_BUFFER}: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum allowed buffer size of 9 bytes.",
    "[malloc] Unable to allocate 10 bytes.",
    "[malloc_or_wait] Unable to allocate 10 bytes.",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "CUDA error: OUT OF MEMORY",
    "std::bad_alloc",
    "Cannot allocate memory",
]
OTHER = [
    f"{COMMAND_BUFFER}: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
    "[compile] memory of a person's own loss function",
    "[metal::Device] Unable to load kernel foo",
    "[matmul] Last dimension of first input with shape (2,3) must match",
]


@pytest.mark.parametrize("change", [str, str.upper, str.lower])
@pytest.mark.parametrize("words", OUT_OF_MEMORY)
def test_every_device_s_words_for_no_memory_are_known(words, change):
    assert isinstance(out_of_memory(RuntimeError(change(words)), ()), OutOfMemory)
    assert isinstance(out_of_memory(MemoryError(), ()), OutOfMemory)


@pytest.mark.parametrize("words", OTHER)
def test_other_errors_stay_what_they_are(words):
    error = RuntimeError(words)
    with pytest.raises(RuntimeError) as raised:
        out_of_memory(error, ())
    assert raised.value is error
    with pytest.raises(RuntimeError) as raised, memory.memory_errors("testing", ""):
        raise error
    assert raised.value is error


def system(root, *, available=64, swap=0, cgroup="0::/job\n", **files):
    """A /proc and /sys with so many GB free, and files of control groups by path."""
    (root / "proc/self").mkdir(parents=True)
    meminfo = f"MemTotal: 99 kB\nMemAvailable: {available * 10**6} kB\nSwapFree: {swap * 10**6} kB\n"
    (root / "proc/meminfo").write_text(meminfo)
    (root / "proc/self/cgroup").write_text(cgroup)
    for path, text in files.items():
        (root / "sys/fs/cgroup" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / path).write_text(text)
    return root


def group(folder, most, used, *, cache=0, names=("memory.max", "memory.current")):
    stat = f"anon 1\ninactive_file {cache}\nactive_file 0\n"
    return {f"{folder}{names[0]}": f"{most}\n", f"{folder}{names[1]}": f"{used}\n", f"{folder}memory.stat": stat}


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
GB = 10**9


@pytest.mark.skipif(not backend.is_cpu(), reason="of a CPU's memory")
@pytest.mark.parametrize(
    ("given", "free"),
    [
        ({}, 64 * 1.024 * GB),
        ({"swap": 8}, 72 * 1.024 * GB),
        (group("job/", 8 * GB, 5 * GB), 3 * GB),
        (group("job/", 8 * GB, 5 * GB, cache=2 * GB), 5 * GB),
        (group("job/", "max", 5 * GB), 64 * 1.024 * GB),
        (group("", 8 * GB, 6 * GB), 2 * GB),  # in a container, where the path is that of the host
        ({**group("job/", 8 * GB, 5 * GB), **group("", 4 * GB, 3 * GB)}, 1 * GB),
        (group("job/", 2 * GB, 3 * GB), 0),
        ({"cgroup": "9:cpu,memory:/job\n1:cpu:/\n", **group("memory/job/", 8 * GB, 5 * GB, names=V1)}, 3 * GB),
    ],
)
def test_available_memory_is_what_machine_and_control_groups_leave(tmp_path, given, free):
    assert memory.available_memory(system(tmp_path, **given)) == pytest.approx(free)


@pytest.mark.skipif(sys.platform != "linux" or not backend.is_cpu(), reason="of a CPU's memory")
def test_available_memory_minds_a_limit_of_the_address_space(tmp_path):
    (system(tmp_path) / "proc/self/statm").write_text(f"{GB // os.sysconf('SC_PAGE_SIZE')} 1 1 1 0 1 0\n")
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (60 * GB, before[1]))
        assert memory.available_memory(tmp_path) == pytest.approx(59 * GB, rel=1e-3)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_parameters": {"rank": 10**8, "scale": 1.0, "dropout": 0.0}},
        {"lora_parameters": {"rank": 10**9, "scale": 1.0, "dropout": 0.0}, "fine_tune_type": "dora"},
    ],
)
def test_an_adapter_beyond_memory_is_refused_before_it_is_made(tmp_path, tiny_folder, settings):
    run = run_of("sft", tmp_path, tiny_folder, **settings)
    with pytest.raises(
        OutOfMemory, match=r"needs .* GB at its peak .* GB may be used.*`lora_parameters: {rank: 8}` saves"
    ):
        run.step()
    run = run_of("sft", tmp_path, tiny_folder, **settings, memory_limit="off")
    with pytest.raises(OutOfMemory, match=r"rank 10*0 .* needs at least .* GB, and .* GB are available.*lora_param"):
        run.step()


def test_the_state_of_the_optimizer_counts(tmp_path, tiny_folder, monkeypatch):
    asked = []  # twice of each run: for what is tried, and for what is trained
    monkeypatch.setattr("mlx_nb.train.optimizer.shortage", lambda needed: asked.append(needed))
    for name, optimizer in enumerate(("adam", "sgd", "lion")):
        run_of("sft", tmp_path / str(name), tiny_folder, optimizer=optimizer).trainer.close()
    settings = settings_for("sft", tmp_path / "full", tiny_folder, optimizer="adam", fine_tune_type="full")
    del settings["lora_parameters"]
    run = Run(RunConfig.from_dict(settings))
    full = 4 * trainable_count(run.trainer.model)
    adam, sgd, lion, of_full = asked[::2]
    assert asked[1::2] == asked[::2]
    assert adam > lion >= sgd
    assert of_full == pytest.approx(3 * full, rel=1e-3)  # gradient and two moments; the weights are there


def batch_of(rows, width, trained):
    mask = np.zeros((rows, width), np.float32)
    mask[:, -trained:] = 1
    return TokenBatch(np.ones((rows, width), np.int32), mask, tuple(range(rows)), (width,) * rows)


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.matrix(every=2)
def test_what_a_batch_takes_at_the_least_is_less_than_it_takes(rows):
    model = tiny_model(dims=64)
    scorer = TargetScorer(model)
    batch = pad(random_examples(rows, shortest=400, longest=400))
    assert scorer.sizes == ModelSizes(VOCABULARY, 64, 2, 4)

    def loss(parameters):
        model.update(parameters)
        return -scorer.logprobs(target_inputs(batch)).sum()

    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(loss)(model.trainable_parameters()))
    taken = mx.get_peak_memory() - before
    assert taken / 100 < least_bytes(batch, scorer.sizes, trained=True, targets_only=True) < taken


def test_only_positions_that_are_projected_count():
    sizes = ModelSizes(vocabulary=1000, hidden=10, layers=3, itemsize=2)
    batch = batch_of(4, 101, 1)
    assert least_bytes(batch, sizes, trained=False, targets_only=True) == 4 * 1000 * 4 + 400 * 10 * 2
    assert least_bytes(batch, sizes, trained=True, targets_only=True) == 2 * 4 * 1000 * 4 + 400 * 10 * 2 * 3
    assert least_bytes(batch, sizes, trained=False, targets_only=False) == 400 * 1000 * 4 + 400 * 10 * 2


def test_a_batch_beyond_memory_pauses_the_run_with_its_rows_and_changes_nothing(tmp_path, tiny_folder, monkeypatch):
    run = run_of("sft", tmp_path, tiny_folder, val_set_size=0, steps_per_eval=-1)
    run.step()
    before = run.adapter_bytes()
    monkeypatch.setattr(batch_memory, "_WORTH_A_LOOK", 0)
    monkeypatch.setattr(batch_memory, "available_memory", lambda: 1000)
    (*_, failed) = run.events(1)
    assert isinstance(failed, RunFailed)
    assert failed.reason == "out of memory"
    assert failed.rows == run.trainer.next_batches()[0].rows
    assert "needs at least" in failed.error
    assert "lower batch_size" in failed.error
    assert run.adapter_bytes() == before
    monkeypatch.undo()
    assert run.step().step == 2


def test_a_model_beyond_memory_is_refused_before_it_is_computed(tiny_folder, monkeypatch):
    monkeypatch.setattr(loading, "is_cpu", lambda: True)
    monkeypatch.setattr(loading, "shortage", lambda needed: f"needs at least {needed} B, and 0 are available")
    with pytest.raises(OutOfMemory, match="in float32, which this CPU needs, needs at least"):
        loading.load_model(str(tiny_folder))


class Device:
    """mlx's limits on a GPU."""

    def __init__(self, monkeypatch, **information):
        self.wired, self.cache, self.cleared = 0, 10**12, 0
        monkeypatch.setattr(memory, "is_cpu", lambda: False)
        monkeypatch.setattr(memory, "memory_limit", lambda: 8 * 10**9)
        monkeypatch.setattr(mx, "device_info", lambda: information)
        monkeypatch.setattr(mx, "set_wired_limit", lambda size: self._swap("wired", size))
        monkeypatch.setattr(mx, "set_cache_limit", lambda size: self._swap("cache", size))
        monkeypatch.setattr(mx, "clear_cache", lambda: self._swap("cleared", self.cleared + 1))

    def _swap(self, name, value):
        before = getattr(self, name)
        setattr(self, name, value)
        return before


def test_limits_of_a_gpu_are_given_back_by_the_last_run(monkeypatch):
    device = Device(monkeypatch, max_recommended_working_set_size=6 * 10**9)
    first, second = memory.device_limits(), memory.device_limits()
    first.__enter__()
    second.__enter__()
    assert (device.wired, device.cache) == (6 * 10**9, 2 * 10**9)
    first.__exit__(None, None, None)
    assert (device.wired, device.cache) == (6 * 10**9, 2 * 10**9)
    second.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert (device.wired, device.cache) == (0, 10**12)
    assert device.cleared == 1


def test_a_lower_cache_limit_of_the_user_stays(monkeypatch):
    device = Device(monkeypatch)
    device.cache = 5
    with memory.device_limits():
        assert (device.wired, device.cache) == (0, 5)
    assert (device.wired, device.cache) == (0, 5)


def test_a_run_holds_the_limits_while_it_computes_and_no_longer(tmp_path, tiny_folder, monkeypatch):
    run = run_of("sft", tmp_path, tiny_folder, iters=2, val_set_size=4)
    _ = run.trainer
    device = Device(monkeypatch, max_recommended_working_set_size=6 * 10**9)
    seen = [(device.wired, device.cache) for _ in run.events()]
    assert set(seen) == {(6 * 10**9, 2 * 10**9)}
    assert (device.wired, device.cache) == (0, 10**12)
    assert device.cleared >= 3  # after each validation, and at the end


def test_a_cpu_has_no_limits_to_set(monkeypatch):
    monkeypatch.setattr(memory, "is_cpu", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: pytest.fail("set"))
    monkeypatch.setattr(mx, "set_cache_limit", lambda size: pytest.fail("set"))
    with memory.device_limits():
        memory.clear_cache()


KEPT = """
import contextlib, resource
import mlx.core as mx
from mlx_nb.model.memory import device_limits

def new_pages():
    # Arrays of other sizes come and go in between, as in an update.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in [3, 7, 5, 40, 11] * 4:
        mx.eval(mx.zeros(size << 18) + 1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) >> 10

mx.set_default_device(mx.cpu)
mx.eval(mx.zeros(1 << 18) + 1)
usual, before = new_pages(), held()
with device_limits():
    with device_limits():
        new_pages()
    kept, there = new_pages(), held()
print(usual, kept, new_pages(), before, there, held())
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_on_a_cpu_freed_arrays_are_kept_for_the_next_ones_and_given_back_in_the_end():
    done = subprocess.run([sys.executable, "-c", KEPT], check=True, timeout=120, capture_output=True, text=True)
    usual, kept, later, before, there, after = map(int, done.stdout.split())
    assert kept < usual / 10
    assert later > 10 * kept
    assert there > before + 30  # MB
    assert after < before + 20


@pytest.mark.parametrize("name", memory._USER_VARIABLES)
def test_what_the_user_set_in_the_environment_stays(name, monkeypatch):
    class Libc:
        def mallopt(self, name, value):
            pytest.fail("set")

    monkeypatch.setattr(memory, "is_cpu", lambda: True)
    monkeypatch.setattr(memory, "_libc", Libc)
    monkeypatch.setenv(name, "1")
    with memory.device_limits():
        pass


LIMITS = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
before = resource.getrlimit(resource.RLIMIT_NOFILE)
import random, sys
drawn = random.getstate()
from mlx_nb.config.run_config import RunConfig
from mlx_nb.model import adapters, loading
loaded = loading.load_model(sys.argv[1])
adapters.attach_adapter(loaded.model, RunConfig())
assert random.getstate() == drawn
loading.load_tokenizer(loading.model_folder(sys.argv[1]))
assert resource.getrlimit(resource.RLIMIT_NOFILE) == before, resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (299, before[1]))
assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 299
"""


@pytest.mark.long
def test_loading_a_model_leaves_the_number_of_open_files_and_the_random_numbers_as_they_were(tiny_folder):
    subprocess.run([sys.executable, "-c", LIMITS, str(tiny_folder)], check=True, timeout=120)


def test_looking_at_a_model_s_sizes_draws_nothing_from_the_random_stream():
    model = tiny_model()
    model.layers[0].mlp = nn.Sequential(model.layers[0].mlp, nn.Dropout(0.5))
    model.train()
    before = mx.random.state[0].tolist()
    ModelSizes.of(model)
    assert mx.random.state[0].tolist() == before
