"""The CUDA Toolkit and NCCL as the repository `@cuda`, present or not.

`@cuda//:defs.bzl` exports HAVE_CUDA, HAVE_NCCL, NVCC and CUDA_ONLY, the value for
`target_compatible_with` that makes `bazel build //...` skip CUDA targets on a machine without nvcc.
"""

def _cuda_toolkit_impl(ctx):
    home = ctx.path(ctx.os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    nvcc = home.get_child("bin").get_child("nvcc")
    have_cuda = nvcc.exists
    nccl = [p for p in [ctx.path("/usr/include/nccl.h"), home.get_child("include").get_child("nccl.h")] if p.exists]
    build = ["""
package(default_visibility = ["//visibility:public"])

constraint_setting(name = "toolkit")

constraint_value(
    name = "missing",
    constraint_setting = ":toolkit",
)
"""]
    if have_cuda:
        ctx.symlink(home, "home")
        library = "home/lib64" if home.get_child("lib64").exists else "home/lib"
        build.append("""
cc_library(
    name = "headers",
    hdrs = glob(["home/include/*.h", "home/include/crt/*.h"]),
    includes = ["home/include"],
)

cc_library(
    name = "cudart",
    srcs = ["%s/libcudart_static.a"],
    linkopts = ["-ldl", "-lrt", "-lpthread"],
    deps = [":headers"],
)
""" % library)
    else:
        build.append("""
cc_library(name = "headers")

cc_library(name = "cudart")
""")
    if have_cuda and nccl:
        ctx.symlink(nccl[0], "nccl/nccl.h")
        build.append("""
cc_library(
    name = "nccl_headers",
    hdrs = ["nccl/nccl.h"],
    includes = ["nccl"],
    deps = [":headers"],
)
""")
    ctx.file("BUILD", "".join(build))
    ctx.file("defs.bzl", """
HAVE_CUDA = {have_cuda}
HAVE_NCCL = {have_nccl}
NVCC = {nvcc}
CUDA_ONLY = {only}
""".format(
        have_cuda = have_cuda,
        have_nccl = have_cuda and len(nccl) > 0,
        nvcc = repr(str(nvcc)),
        only = [] if have_cuda else ["@cuda//:missing"],
    ))

cuda_toolkit = repository_rule(
    implementation = _cuda_toolkit_impl,
    environ = ["CUDA_HOME"],
    local = True,
    configure = True,
)
