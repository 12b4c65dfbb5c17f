"""cuda_library: C-callable CUDA code, compiled by nvcc with Bazel's own C compiler as host compiler."""

load("@bazel_tools//tools/cpp:toolchain_utils.bzl", "find_cpp_toolchain")
load("@cuda//:defs.bzl", "CUDA_ONLY", "HAVE_CUDA", "NVCC")

# The sanitizers do not look into device code, and nvcc takes minutes: their builds have no CUDA.
CUDA_BUILT = select({
    "//:sanitized": ["@cuda//:missing"],
    "//conditions:default": [],
}) if HAVE_CUDA else CUDA_ONLY

def if_cuda(values):
    """`values` in builds with CUDA; else nothing."""
    return select({
        "//:sanitized": [],
        "//conditions:default": values,
    }) if HAVE_CUDA else []

# The generic path for every card from A100 on, Hopper's own beside it.
_ARCHITECTURES = [
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
]

def _cuda_library_impl(ctx):
    toolchain = find_cpp_toolchain(ctx)
    features = cc_common.configure_features(ctx = ctx, cc_toolchain = toolchain)
    context = cc_common.merge_cc_infos(cc_infos = [dep[CcInfo] for dep in ctx.attr.deps]).compilation_context
    headers = cc_common.create_compilation_context(headers = depset(ctx.files.hdrs))
    include_flags = ["-I.", "-I" + ctx.bin_dir.path]
    include_flags += ["-isystem=" + path for path in context.system_includes.to_list() + context.includes.to_list()]
    objects = []
    for source in ctx.files.srcs:
        object = ctx.actions.declare_file("_nvcc/%s/%s.o" % (ctx.label.name, source.basename))
        ctx.actions.run(
            executable = NVCC,
            arguments = ["-x", "cu", "-c", source.path, "-o", object.path, "-std=c++17", "-O3", "-lineinfo"] +
                        # nvcc names its files in /tmp by its process number, which is the same in every sandbox.
                        ["--objdir-as-tempdir"] +
                        ["-ccbin", toolchain.compiler_executable, "-Xcompiler=-fPIC,-Wall,-Wextra", "-Werror=all-warnings"] +
                        ctx.attr.architectures + include_flags + ctx.attr.copts,
            inputs = depset([source] + ctx.files.hdrs, transitive = [context.headers, toolchain.all_files]),
            outputs = [object],
            env = {"PATH": "/bin:/usr/bin:/usr/local/bin"},
            mnemonic = "CudaCompile",
            progress_message = "Compiling %s with nvcc" % source.short_path,
        )
        objects.append(object)
    outputs = cc_common.create_compilation_outputs(
        objects = depset(objects),
        pic_objects = depset(objects),
    )
    linking, _ = cc_common.create_linking_context_from_compilation_outputs(
        actions = ctx.actions,
        name = ctx.label.name,
        feature_configuration = features,
        cc_toolchain = toolchain,
        compilation_outputs = outputs,
        disallow_dynamic_library = True,
    )
    own = CcInfo(compilation_context = headers, linking_context = linking)
    return [
        DefaultInfo(files = depset(objects)),
        cc_common.merge_cc_infos(cc_infos = [own] + [dep[CcInfo] for dep in ctx.attr.deps]),
    ]

_cuda_library = rule(
    implementation = _cuda_library_impl,
    attrs = {
        "srcs": attr.label_list(allow_files = [".cu"], mandatory = True),
        "hdrs": attr.label_list(allow_files = [".h", ".cuh"]),
        "deps": attr.label_list(providers = [CcInfo]),
        "copts": attr.string_list(),
        "architectures": attr.string_list(),
        "_cc_toolchain": attr.label(default = "@bazel_tools//tools/cpp:current_cc_toolchain"),
    },
    fragments = ["cpp"],
    toolchains = ["@bazel_tools//tools/cpp:toolchain_type"],
)

def cuda_library(name, srcs, hdrs = [], deps = [], copts = [], **kwargs):
    """A library of .cu files behind extern "C" headers; skipped by `//...` where there is no CUDA Toolkit.

    Args:
      name: use it as a dep of any cc rule that is itself CUDA_BUILT, or under if_cuda.
      srcs: .cu files.
      hdrs: .h and .cuh files.
      deps: cc_library or cuda_library targets.
      copts: further nvcc flags.
      **kwargs: visibility, tags.
    """
    _cuda_library(
        name = name,
        srcs = srcs,
        hdrs = hdrs,
        deps = deps + ["@cuda//:cudart"],
        copts = copts + select({
            "//:checked": ["-DATTN_CUDA_CHECKED"],
            "//conditions:default": [],
        }),
        architectures = select({
            "//:generic": ["-gencode=arch=compute_80,code=compute_80"],
            "//conditions:default": _ARCHITECTURES,
        }),
        target_compatible_with = CUDA_BUILT,
        **kwargs
    )
