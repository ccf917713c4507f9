"""Check the shapes in every signature of llmlib while the tests run."""

from jaxtyping import install_import_hook

# Before any test module imports llmlib: from here on, a tensor whose shape breaks its annotation is an error.
install_import_hook("llmlib", "beartype.beartype")
