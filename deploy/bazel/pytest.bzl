"""Files of tests, run by pytest."""

load("@rules_python//python:defs.bzl", "py_test")

def pytest_test(name, deps, tags = []):
    """Runs the tests in `name`.py.

    Args:
      name: of the file, without its ending.
      deps: what it imports, and the conftest.py files above it.
      tags: "host" for tests that need the machine: server processes, or the whole repository.
    """
    file = name + ".py"
    py_test(
        name = name,
        # pyproject.toml limits one test to two minutes; this is for all in the file.
        size = "medium",
        srcs = [file, "//deploy/bazel:run_pytest.py"],
        main = "//deploy/bazel:run_pytest.py",
        args = ["%s/%s" % (native.package_name(), file)],
        data = ["//:pyproject.toml"],
        legacy_create_init = 0,
        tags = tags,
        deps = deps,
    )
