"""protobuf_c_library: C structs and packers, and the descriptor set, of one .proto file."""

def protobuf_c_library(name, src):
    """Generates `<src>.pb-c.c` and `.pb-c.h` as a cc_library, and `<src>.descriptor` beside it.

    Args:
      name: of the cc_library; include its header as "proto/<src without .proto>.pb-c.h".
      src: a .proto file of this package.
    """
    stem = src[:-len(".proto")]
    native.genrule(
        name = name + "_generate",
        srcs = [src],
        outs = [stem + ".pb-c.c", stem + ".pb-c.h", stem + ".descriptor"],
        cmd = ("protoc-c --proto_path=. --c_out=$(GENDIR) $(location {src}) && " +
               "protoc-c --proto_path=. --include_imports --descriptor_set_out=$(GENDIR)/{package}/{stem}.descriptor $(location {src})").format(
            src = src,
            stem = stem,
            package = native.package_name(),
        ),
        message = "Generating protobuf-c code for",
    )
    native.filegroup(
        name = name + "_descriptor",
        srcs = [stem + ".descriptor"],
    )
    native.cc_library(
        name = name,
        srcs = [stem + ".pb-c.c"],
        hdrs = [stem + ".pb-c.h"],
        copts = ["-Wno-missing-braces"],
        deps = ["@protobuf_c//:protobuf_c"],
    )
