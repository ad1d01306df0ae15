#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Says what it sees from inside the enclave, and ends with the status that HELLO_EXIT names.
echo "hello from inside"
echo "kernel       $(uname -sr)"
echo "memory       $(awk '/^MemTotal:/ { print int($2 / 1024) }' /proc/meminfo) MiB"
echo "CPUs         $(nproc)"
echo "user         $(id -un) ($(id -u):$(id -g))"
echo "directory    $(pwd)"
echo "environment"
env | sort | while read -r line; do echo "  $line"; done
exit "${HELLO_EXIT:-42}"
