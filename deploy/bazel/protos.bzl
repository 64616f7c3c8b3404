"""Contracts as Python modules, generated with the grpc_tools of the environment."""

load("@rules_python//python:defs.bzl", "py_library")

_ROOT = "protos/"

def python_protos(name, srcs, deps = []):
    """Generates one package of contracts.

    Args:
      name: of the Python library, imported as the folder below protos/ says.
      srcs: its .proto files.
      deps: other targets of this rule, whose files it imports.
    """
    if not native.package_name().startswith(_ROOT):
        fail("%s is not below %s" % (native.package_name(), _ROOT))
    folder = native.package_name()[len(_ROOT):]
    up = "/".join([".."] * len(folder.split("/")))

    native.filegroup(
        name = name + "_sources",
        # A target of this rule is named as its folder, so its label is the folder alone.
        srcs = srcs + ["%s:%s_sources" % (dep, dep.split("/")[-1]) for dep in deps],
    )
    generated = [
        src[:-len(".proto")] + suffix
        for src in srcs
        for suffix in ("_pb2.py", "_pb2_grpc.py")
    ]
    native.genrule(
        name = name + "_generated",
        srcs = [":" + name + "_sources"],
        outs = generated,
        cmd = "$(location //deploy/bazel:generate_protos) $(RULEDIR)/{up} {files}".format(
            up = up,
            files = " ".join(["%s/%s" % (folder, src) for src in srcs]),
        ),
        tools = ["//deploy/bazel:generate_protos"],
    )
    py_library(
        name = name,
        srcs = generated,
        imports = [up],
        deps = deps,
    )
