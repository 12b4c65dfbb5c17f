#!/bin/sh
# Prints a C file that defines descriptor_sets (see descriptors.h) from descriptor set files.
set -eu
echo '#include "service/descriptors.h"'
number=0
for file; do
    echo "static const uint8_t set_${number}[] = {"
    od -An -v -tu1 "$file" | sed 's/  */,/g; s/^,//; s/$/,/'
    echo "};"
    number=$((number + 1))
done
echo "const descriptor_set descriptor_sets[] = {"
for index in $(seq 0 $((number - 1))); do
    echo "    {set_$index, sizeof set_$index},"
done
echo "};"
echo "const size_t descriptor_set_count = $number;"
