"""The interpreter and the packages of .venv, as a Bazel toolchain.

`make env` makes .venv from requirements/dev.txt. Bazel takes it as it is, so tests run with the same
versions there and everywhere else, and nothing is fetched twice.
"""

_BUILD = """\
load("@rules_python//python:defs.bzl", "py_runtime", "py_runtime_pair")

py_runtime(
    name = "python",
    interpreter_path = "{interpreter}",
    python_version = "PY3",
)

py_runtime_pair(
    name = "runtimes",
    py3_runtime = ":python",
)

toolchain(
    name = "toolchain",
    toolchain = ":runtimes",
    toolchain_type = "{toolchain_type}",
)
"""

def _python_environment_impl(context):
    root = context.path(Label("//:pyproject.toml")).dirname
    interpreter = root.get_child(".venv").get_child("bin").get_child("python")
    if not interpreter.exists:
        fail("%s is missing: run `make env` first" % interpreter)
    context.file("BUILD", _BUILD.format(
        interpreter = interpreter,
        toolchain_type = context.attr.toolchain_type,
    ))

python_environment = repository_rule(
    implementation = _python_environment_impl,
    attrs = {
        "toolchain_type": attr.string(
            mandatory = True,
            doc = "Label of the toolchain type that Python rules look for.",
        ),
    },
    local = True,
)
