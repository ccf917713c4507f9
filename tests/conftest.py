"""Check the shapes in every signature of llmlib, compute on one thread, and start kernels safely."""

import hypothesis
import nbval.kernel
import torch
from jaxtyping import install_import_hook

# Before any test module imports llmlib: from here on, a tensor whose shape breaks its annotation is an error.
install_import_hook("llmlib", "beartype.beartype")

torch.set_num_threads(1)  # tests are so small that they would wait for a second thread longer than they run

# A busy machine may take any time for an example: that is no fault of the code.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

_start_kernel = nbval.kernel.start_new_kernel


def _start_kernel_trying_twice(*args, **kwargs):
    """Start a kernel; of two that start at once, one may find its port taken by the other, and die."""
    try:
        return _start_kernel(*args, **kwargs)
    except RuntimeError:
        return _start_kernel(*args, **kwargs)


nbval.kernel.start_new_kernel = _start_kernel_trying_twice
