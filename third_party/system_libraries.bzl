"""System libraries as Bazel repositories: `@name//:name` is a cc_library of what pkg-config says."""

def _pkg_config(ctx, *args):
    result = ctx.execute(["pkg-config"] + list(args))
    if result.return_code != 0:
        fail(("%s is missing: run `./dev build` once, or `apt-get install %s pkg-config`.\n%s") %
             (ctx.attr.package, ctx.attr.apt, result.stderr))
    return [flag for flag in result.stdout.strip().split(" ") if flag]

def _pkg_config_library_impl(ctx):
    flags = _pkg_config(ctx, "--cflags", ctx.attr.package)
    includes = []
    for number, flag in enumerate([f for f in flags if f.startswith("-I")]):
        # Headers outside the default search path are linked into the repository.
        ctx.symlink(flag[2:], "include%d" % number)
        includes.append("include%d" % number)
    ctx.file("BUILD", """
cc_library(
    name = {name},
    hdrs = glob(["include*/**/*.h"], allow_empty = True),
    includes = {includes},
    defines = {defines},
    linkopts = {linkopts},
    visibility = ["//visibility:public"],
)
""".format(
        name = repr(ctx.name),
        includes = repr(includes),
        defines = repr([f[2:] for f in flags if f.startswith("-D")]),
        linkopts = repr(ctx.attr.libs or _pkg_config(ctx, "--libs", ctx.attr.package)),
    ))

pkg_config_library = repository_rule(
    implementation = _pkg_config_library_impl,
    doc = """A system library found by pkg-config.

`apt` names the Debian package for the error message; `libs` replaces pkg-config's link line where
that names what only static linking needs.""",
    attrs = {
        "package": attr.string(mandatory = True),
        "apt": attr.string(mandatory = True),
        "libs": attr.string_list(),
    },
    environ = ["PKG_CONFIG_PATH"],
    local = True,
    configure = True,
)
