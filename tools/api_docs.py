"""Writes docs/api.md from the comments of a .proto file; `./dev docs` and `./dev lint` call it.

  api_docs.py [--check] PROTO OUTPUT

With --check nothing is written: the exit status is 1 if OUTPUT is not what PROTO says.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

Field = descriptor_pb2.FieldDescriptorProto
SCALARS = {number: name[len("TYPE_"):].lower() for name, number in Field.Type.items()}
LocationPath = tuple[int, ...]

# Field numbers of descriptor.proto that a source location's path is made of.
MESSAGES, ENUMS, SERVICES, SYNTAX = 4, 5, 6, 12
MEMBERS = 2


def load(proto: Path) -> descriptor_pb2.FileDescriptorProto:
    """The file's descriptor, with the source locations that carry its comments."""
    with tempfile.NamedTemporaryFile() as output:
        status = protoc.main(["protoc", f"--proto_path={proto.parent}", "--include_source_info",
                              f"--descriptor_set_out={output.name}", str(proto)])
        if status != 0:
            sys.exit(status)
        return descriptor_pb2.FileDescriptorSet.FromString(Path(output.name).read_bytes()).file[0]


def comments_of(file: descriptor_pb2.FileDescriptorProto) -> dict[LocationPath, str]:
    """The comment of each element: the one above it and the one behind it, joined."""
    comments = {}
    for location in file.source_code_info.location:
        above = location.leading_comments
        if tuple(location.path) == (SYNTAX,):
            above = "".join([*location.leading_detached_comments, above])
        lines = [line[1:] if line.startswith(" ") else line
                 for line in (above + location.trailing_comments).splitlines()]
        comments[tuple(location.path)] = "\n".join(lines).strip()
    return comments


def type_name(field: Field, package: str) -> str:
    if field.type in (Field.TYPE_MESSAGE, Field.TYPE_ENUM):
        short = field.type_name.replace(f".{package}.", "")
        name = f"[{short}](#{short.lower()})"
    else:
        name = SCALARS[field.type]
    return f"repeated {name}" if field.label == Field.LABEL_REPEATED else name


def message_link(name: str, streaming: bool) -> str:
    short = name.rsplit(".", 1)[-1]
    return f"{'stream of ' if streaming else ''}[{short}](#{short.lower()})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def render(file: descriptor_pb2.FileDescriptorProto) -> str:
    comments = comments_of(file)
    parts = [f"# API: {file.package}\n",
             f"Written by `./dev docs` from `proto/{file.name}`; edit the comments there.\n",
             "```\n" + comments.get((SYNTAX,), "") + "\n```\n"]
    for s, service in enumerate(file.service):
        parts.append(f"## Service {service.name}\n")
        for m, method in enumerate(service.method):
            parts.append(f"### {method.name}\n")
            parts.append(f"{message_link(method.input_type, method.client_streaming)} → "
                         f"{message_link(method.output_type, method.server_streaming)}\n")
            parts.append(comments.get((SERVICES, s, MEMBERS, m), "") + "\n")
    parts.append("## Messages\n")
    for i, message in enumerate(file.message_type):
        parts.append(f"### {message.name}\n")
        if comments.get((MESSAGES, i)):
            parts.append(comments[(MESSAGES, i)] + "\n")
        if message.field:
            parts.append(table(("field", "number", "type", "meaning"), (
                (f"`{field.name}`", str(field.number), type_name(field, file.package),
                 comments.get((MESSAGES, i, MEMBERS, f), ""))
                for f, field in enumerate(message.field))))
        else:
            parts.append("No fields.\n")
    parts.append("## Enums\n")
    for i, enum in enumerate(file.enum_type):
        parts.append(f"### {enum.name}\n")
        parts.append(table(("value", "number", "meaning"), (
            (f"`{value.name}`", str(value.number), comments.get((ENUMS, i, MEMBERS, v), ""))
            for v, value in enumerate(enum.value))))
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("proto", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    text = render(load(arguments.proto))
    if not arguments.check:
        arguments.output.write_text(text)
        print(f"wrote {arguments.output}")
        return 0
    if arguments.output.exists() and arguments.output.read_text() == text:
        return 0
    print(f"{arguments.output} is not what {arguments.proto} says: run ./dev docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
