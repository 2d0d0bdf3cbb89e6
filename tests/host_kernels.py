"""The project's kernels for GPUs, compiled for this machine's processor."""

import re
import subprocess
from pathlib import Path

from dcformer_deploy.runtime.backends.sampler import SOURCE

NAMES = re.findall(r'extern "C" __global__ void (\w+)\(', SOURCE.read_text())
_HOST = """
#define __device__
#define __global__
struct Index { unsigned x; };
static thread_local Index blockIdx, blockDim, threadIdx;
#include "sample.cu"
template <class Argument> static void run(void (*kernel)(Argument), void *argument, unsigned blocks, unsigned threads) {
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(*(Argument *)argument);
}
template <class Argument> static constexpr unsigned long bytes(void (*)(Argument)) { return sizeof(Argument); }
#define ON_HOST(kernel) \\
    extern "C" { extern const unsigned long kernel##_bytes; const unsigned long kernel##_bytes = bytes(kernel); } \\
    extern "C" void kernel##_on_host(void *argument, unsigned blocks, unsigned threads) { \\
        run(kernel, argument, blocks, threads); \\
    }
extern "C" float float_of(unsigned short half) { return from_half(half); }
extern "C" unsigned short half_of(float value) { return to_half(value); }
"""


def compile_for_host(folder: Path) -> Path:
    """A library with ``NAME_on_host(argument, blocks, threads)`` and ``NAME_bytes``, its argument's size, of each."""
    (folder / "host.cpp").write_text(_HOST + "".join(f"ON_HOST({name})\n" for name in NAMES))
    subprocess.run(["g++", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-I", SOURCE.parent, "-o",
                    folder / "kernels.so", folder / "host.cpp"], check=True)
    return folder / "kernels.so"
